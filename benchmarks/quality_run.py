"""One run of benchmarks/quality.py: a recipe from the same start, and what became of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from hydra.utils import instantiate
from quality_data import OPEN_CLIP_VIEW, Part, View, batches, evaluators
from torch import Tensor

from quiltnet.evaluation.measuring import measure
from quiltnet.evaluation.outcome import Outcome
from quiltnet.model.adapters import Tuning, apply_tuning, freeze_waiting, waiting
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.training.averaging import Averaging
from quiltnet.training.batchnorm import LEAST_IMAGES, adapt_statistics, first_images
from quiltnet.training.engine import seed_everything, start_training, train_step
from quiltnet.training.interpolation import interpolate
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from quiltnet.training.precision import build_accelerator
from quiltnet.training.schedules import WarmupCosine

ROOT = Path(__file__).resolve().parents[1]
IMAGE_SIZE, CONTEXT_LENGTH = 96, 32
BATCH_SIZE, TOTAL_SAMPLES, WARMUP_SHARE = 64, 2048, 0.1
START_SHARE = 0.2  # of WiSE-FT
# Fields of Recipe that came when there were records already: at their defaults they leave a run's name as it was.
ADDED = ("batch_size", "projection_lr_factor", "image_thaw_samples", "text_thaw_samples")


@dataclass(frozen=True)
class Recipe:
    """Everything that may differ between two runs; the defaults are those of open_clip's trainer.

    Attributes:
        batchnorm: ``train``; ``frozen`` with ImageNet's statistics; ``adapted``: frozen with the tiles' own
        image_thaw_samples, text_thaw_samples: until so many samples only the projections train.
        is_peer: open_clip's ``ClipLoss`` and the parameter groups of its trainer.
        ema_decay: of a moving average of the weights.
        weights: which are scored: ``last``, ``average``, or ``mixed`` (WiSE-FT: the average, or else the last ones,
            with ``START_SHARE`` of the start).
    """

    lr: float
    view: View = OPEN_CLIP_VIEW
    is_peer: bool = False
    batchnorm: str = "train"
    duplicates: str = "ignore"
    label_smoothing: float = 0.0
    image_image_weight: float = 0.0
    layer_decay: float = 1.0
    image_lr_factor: float = 1.0
    text_lr_factor: float = 1.0
    logit_scale_lr_factor: float = 1.0
    weight_decay: float = 0.2
    max_grad_norm: float | None = None
    ema_decay: float | None = None
    weights: str = "last"
    batch_size: int = BATCH_SIZE
    projection_lr_factor: float = 1.0
    image_thaw_samples: int = 0
    text_thaw_samples: int = 0

    def training_id(self) -> str:
        """Equal for recipes that train alike, whichever of their weights are scored."""
        facts = {name: value for name, value in asdict(self).items() if name != "weights"}
        for name in ADDED:
            if facts[name] == getattr(Recipe, name):
                del facts[name]
        if self.batchnorm == "adapted":
            facts["adapted_on"] = LEAST_IMAGES  # records without it are of another way to measure: docs/quality.md
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def load_start() -> ContrastiveModel:
    """effnet-lite0 and MiniLM with fresh projections, the same for every run."""
    config = yaml.safe_load((ROOT / "conf/model/effnet-lite0-minilm.yaml").read_text(encoding="utf-8"))
    config["image_size"] = IMAGE_SIZE
    config["text"]["context_length"] = CONTEXT_LENGTH
    seed_everything(0)
    return instantiate(config, _convert_="all")


def fine_tune(start: ContrastiveModel, part: Part, recipe: Recipe, seed: int) -> dict[str, ContrastiveModel]:
    """``last``: the model after the last step; ``average``: its moving average, where the recipe has one."""
    model = deepcopy(start)
    model.batchnorm = "train" if recipe.batchnorm == "train" else "frozen"
    model.clip.visual.to(memory_format=torch.channels_last)  # faster on a CPU, and the same sums
    tuning = Tuning(image_thaw_samples=recipe.image_thaw_samples, text_thaw_samples=recipe.text_thaw_samples)
    apply_tuning(model, tuning)
    waits = waiting(model, tuning)
    stream = partial(batches, part.train, model, recipe.view, batch_size=recipe.batch_size, seed=seed)
    if recipe.batchnorm == "adapted":
        adapt_statistics(model, first_images(stream(), recipe.batch_size))
    torch.manual_seed(seed)  # dropout
    state = start_training(
        model,
        _optimizer(model, recipe),
        WarmupCosine(TOTAL_SAMPLES, round(WARMUP_SHARE * TOTAL_SAMPLES)),
        global_batch_size=recipe.batch_size,
        accelerator=build_accelerator(cpu=True),
        averaging=None if recipe.ema_decay is None else Averaging(recipe.ema_decay),
    )
    objective = _peer_objective if recipe.is_peer else _objective(recipe)
    pairs = stream()
    state.model.train()
    while state.samples_seen < TOTAL_SAMPLES:
        if freeze_waiting(model, waits, state.samples_seen):
            state.model.train()
        train_step(state, next(pairs), objective, max_grad_norm=recipe.max_grad_norm)
    models = {"last": state.unwrapped}
    if state.average is not None:
        models["average"] = state.average.module
    return models


def between(base: ContrastiveModel, tuned: ContrastiveModel, alpha: float) -> ContrastiveModel:
    """Weights between those of two models (WiSE-FT): 0 is the base, 1 the tuned model."""
    mixed = deepcopy(tuned)
    mixed.load_state_dict(interpolate(base.state_dict(), tuned.state_dict(), alpha))
    return mixed


def _optimizer(model: ContrastiveModel, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.is_peer:
        # open_clip_train 3.3.0, main.py
        named = [(name, parameter) for name, parameter in model.clip.named_parameters() if parameter.requires_grad]
        exempt = [p for n, p in named if p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias", "logit_scale"))]
        decayed = [p for n, p in named if all(p is not other for other in exempt)]
        groups = [{"params": exempt, "weight_decay": 0.0}, {"params": decayed, "weight_decay": recipe.weight_decay}]
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    return build_optimizer(
        model,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay,
        image_lr_factor=recipe.image_lr_factor,
        text_lr_factor=recipe.text_lr_factor,
        projection_lr_factor=recipe.projection_lr_factor,
        logit_scale_lr_factor=recipe.logit_scale_lr_factor,
    )


def _peer_objective(features: Any, batch: Any) -> dict[str, Tensor]:
    loss = open_clip.ClipLoss()
    return {"loss": loss(features.image_features, features.text_features, features.logit_scale)}


def _objective(recipe: Recipe) -> Objective:
    contrastive = InfoNCE(duplicates=recipe.duplicates, label_smoothing=recipe.label_smoothing)
    return Objective(contrastive, image_image_weight=recipe.image_image_weight)


class Records:
    """Finished runs on disk: what was scored a line each, bootstrap replicates in a file each.

    A run that is there is not made again, so a benchmark that was stopped goes on where it was.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = folder / "runs.jsonl"
        (folder / "outcomes").mkdir(parents=True, exist_ok=True)

    def all(self) -> dict[str, dict[str, Any]]:
        """Run -> its line."""
        if not self.lines.exists():
            return {}
        lines = map(json.loads, self.lines.read_text(encoding="utf-8").splitlines())
        return {line["run"]: line for line in lines}

    def outcomes(self, run: str) -> dict[str, dict[str, Outcome]]:
        """Model (``last``, ``average``) -> evaluator -> outcome."""
        return torch.load(self._file(run), weights_only=False)

    def add(
        self, run: str, recipe: Recipe, outcomes: Mapping[str, Mapping[str, Outcome]], seconds: Mapping[str, float]
    ) -> None:
        torch.save({name: dict(of_model) for name, of_model in outcomes.items()}, self._file(run))
        scores = {name: {key: out.scores for key, out in of.items()} for name, of in outcomes.items()}
        line = {"run": run, "recipe": asdict(recipe), "scores": scores, **seconds}
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _file(self, run: str) -> Path:
        return self.folder / "outcomes" / (run.replace("/", "__") + ".pt")


def make_run(
    records: Records, fold: str, start: ContrastiveModel, part: Part, recipe: Recipe, seed: int, weights: Sequence[str]
) -> str:
    """Trains and scores, unless that was done; the name of the run.

    weights: which of the run's are scored.
    """
    run = f"{fold}/{recipe.training_id()}/{seed}"
    if run in records.all():
        return run
    began, cpu = time.monotonic(), time.process_time()
    models = fine_tune(start, part, recipe, seed)
    trained = time.monotonic() - began
    if "mixed" in weights:
        models["mixed"] = between(start, list(models.values())[-1], 1 - START_SHARE)
    chosen = {name: model for name, model in models.items() if name in weights}
    outcomes = {name: measure(model, evaluators(part)) for name, model in chosen.items()}
    seconds = {"train_s": trained, "all_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    records.add(run, recipe, outcomes, {name: round(value, 1) for name, value in seconds.items()})
    return run


def peer(lr: float) -> Recipe:
    """open_clip's loss and the defaults of its trainer, at the rate that suits it."""
    return Recipe(lr=lr, is_peer=True)


def without(recipe: Recipe, part: str) -> Recipe:
    """The recipe with one part left out."""
    view = recipe.view
    changes: dict[str, dict[str, Any]] = {
        "duplicates": {"duplicates": "ignore"},
        "flips and rotations": {"view": replace(view, turned=False)},
        "stain jitter": {"view": replace(view, hed_jitter=0.0)},
        "layer decay": {"layer_decay": 1.0},
        "adapted BatchNorm (it trains)": {"batchnorm": "train"},
        "adapted BatchNorm (ImageNet's stays)": {"batchnorm": "frozen"},
        "gradient clipping": {"max_grad_norm": None},
    }
    return replace(recipe, **changes[part])
