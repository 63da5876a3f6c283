"""``quiltnet export``: a run becomes a folder that open_clip loads."""

from __future__ import annotations

from pathlib import Path

from quiltnet.cli.run_directory import check_writable
from quiltnet.release.hub import export_open_clip, load_model


def export(source: str, out: Path) -> None:
    """Write the newest weights of ``source`` in open_clip's layout and say what was compared."""
    check_writable(out)
    difference = export_open_clip(load_model(source), out)
    print(f"{out}: open_clip reloads it; largest difference of embeddings {difference:.1e}")
    print(f'  open_clip.create_model_and_transforms("local-dir:{out}")')
    print(f'  quiltnet.load("{out}")')
