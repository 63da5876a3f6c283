"""QuiltNet: fine-tune, measure and publish CLIP-type models on histopathology image-caption pairs."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazily: `import quiltnet` and `quiltnet --help` must not wait for torch.
    if name == "load":
        from quiltnet.release.hub import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
