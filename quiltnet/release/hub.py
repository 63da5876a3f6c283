"""Load a model from wherever it lies: a run, an exported folder, the hub, a name of open_clip's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.changes import Changes
from quiltnet.model.contrastive import BatchNormMode, ContrastiveModel
from quiltnet.model.embedder import Embedder
from quiltnet.model.folder import CONFIG_NAME
from quiltnet.model.loading import load_folder, load_openai
from quiltnet.model.transformers_clip import is_transformers_clip, load_transformers_clip
from quiltnet.release.downloading import download
from quiltnet.training.averaging import AVERAGE_SUFFIX
from quiltnet.training.checkpoint import AVERAGE_NAME, best_checkpoint, check_checkpoint, latest_checkpoint
from quiltnet.training.checkpoint import WEIGHTS_NAME as CHECKPOINT_WEIGHTS_NAME

HUB_PREFIX = "hub:"
BEST_SUFFIX = "@best"
DESCRIPTION_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"


def load(source: str | Path) -> Embedder:
    """A model ready to encode: ``encode_images(list of PIL)``, ``encode_text(list of str)``.

    Args:
        source: a run directory (its newest checkpoint, or with ``@best`` the best that it kept), one of its
            checkpoints (each of these with ``@ema`` behind it for averaged weights), a folder in the layout of
            open_clip (an export) or of transformers' ``CLIPModel``, ``hub:org/name`` or ``hub:org/name@revision`` of
            either layout, OpenAI's own ``.pt``, or ``architecture:pretrained`` by open_clip's names.
    """
    return Embedder(load_model(source))


def load_model(
    source: str | Path,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    init_logit_bias: float | None = None,
    batchnorm: BatchNormMode = "frozen",
) -> ContrastiveModel:
    """As ``load``, the model itself, and what a run that begins with it may change.

    Args:
        image_size, context_length: in place of the model's; position embeddings are resized, and a line says so.
        init_logit_bias: give the model the bias that SigLIP's loss adds, with this value, unless it has one.
        batchnorm: in training: as in ``Changes``.

    Raises:
        UserError: no such model, weights that are not those of its description, a run without averaged weights, a size
            that does not suit.
    """
    name = str(source)
    changes = Changes(image_size, context_length, init_logit_bias, batchnorm)
    at = read_source(name)
    if checkpoint := find_checkpoint(at):
        return _load_checkpoint(checkpoint, at.averaged, changes)
    if at.averaged or at.best:
        raise UserError(
            f"{name}: {at.path} is neither a run directory nor a checkpoint, and only they keep an average or a best"
        )
    path = download(name.removeprefix(HUB_PREFIX)) if name.startswith(HUB_PREFIX) else at.path
    if (path / CONFIG_NAME).is_file():
        return load_folder(path, changes=changes)
    if is_transformers_clip(path):
        return load_transformers_clip(path, changes=changes)
    if path.is_file():
        return load_openai(path, changes=changes)
    architecture, colon, pretrained = name.partition(":")
    if colon and not path.exists():
        return build_model(architecture, pretrained=pretrained, **asdict(changes))
    raise UserError(
        f"{name} is no model: give a run directory (outputs/…), an exported folder with {CONFIG_NAME}, a folder of "
        "transformers whose config.json names CLIPModel, hub:org/name, OpenAI's ViT-B-32.pt, or an open_clip name:tag "
        "such as ViT-B-32:openai"
    )


@dataclass(frozen=True)
class Source:
    """A model's name, taken apart: what stands before ``@best`` and ``@ema``, and whether they are there."""

    path: Path
    best: bool = False
    averaged: bool = False

    @property
    def run(self) -> Path | None:
        """The run directory that the path is, or that it is a checkpoint of; None for anything else."""
        place = self.path.resolve()
        folder = place.parent.parent if place.parent.name == CHECKPOINTS_FOLDER else self.path
        return folder if (folder / DESCRIPTION_FOLDER / CONFIG_NAME).is_file() else None


def read_source(source: str | Path) -> Source:
    """A path that exists is taken as it is, whatever its name ends with."""
    name = str(source)
    averaged = name.endswith(AVERAGE_SUFFIX) and not Path(name).exists()
    name = name.removesuffix(AVERAGE_SUFFIX) if averaged else name
    best = name.endswith(BEST_SUFFIX) and not Path(name).exists()
    return Source(Path(name.removesuffix(BEST_SUFFIX) if best else name), best, averaged)


def find_checkpoint(source: Source) -> Path | None:
    """A run directory's newest or best checkpoint, or the path itself where it is one; None for anything else.

    Raises:
        UserError: there is none yet, or none that is best or valid.
    """
    path, weights = source.path, AVERAGE_NAME if source.averaged else CHECKPOINT_WEIGHTS_NAME
    if (path / CONFIG_NAME).is_file() or is_transformers_clip(path):
        return None
    if (path / CHECKPOINT_WEIGHTS_NAME).is_file():
        if source.best:
            raise UserError(f"{path} is one checkpoint; {BEST_SUFFIX} stands behind a run directory")
        return _undamaged(path, weights)
    if not (path / DESCRIPTION_FOLDER / CONFIG_NAME).is_file():
        return None
    root = path / CHECKPOINTS_FOLDER
    checkpoint = best_checkpoint(root) if source.best else latest_checkpoint(root, (weights,))
    if checkpoint is None and source.best:
        raise UserError(
            f"{path} has no best checkpoint: no metric was measured at one that it kept; train with "
            f"callbacks.keep_best=1, or leave out {BEST_SUFFIX}"
        )
    if checkpoint is None:
        raise UserError(f"{path} has no finished checkpoint yet")
    return _undamaged(checkpoint, weights) if source.best else checkpoint


def _undamaged(checkpoint: Path, weights: str) -> Path:
    if why := check_checkpoint(checkpoint, (weights,)):
        raise UserError(f"{checkpoint} is no valid checkpoint: {why}; take another one of its run")
    return checkpoint


def _load_checkpoint(checkpoint: Path, averaged: bool, changes: Changes) -> ContrastiveModel:
    description = checkpoint.resolve().parent.parent / DESCRIPTION_FOLDER
    if not (description / CONFIG_NAME).is_file():
        raise UserError(f"{checkpoint} stands outside a run directory; its model is described in {description}")
    weights = checkpoint / (AVERAGE_NAME if averaged else CHECKPOINT_WEIGHTS_NAME)
    if not weights.is_file():
        kept = ", ".join(sorted(file.name for file in checkpoint.iterdir()))
        raise UserError(
            f"{checkpoint} has no {AVERAGE_NAME}, there are {kept}: the run kept no average of its weights; leave out "
            f"{AVERAGE_SUFFIX}"
        )
    return load_folder(description, weights=weights, changes=changes)
