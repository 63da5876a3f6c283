"""What is wrong with a run can often be seen before its first step: its rates, its warm-up, its batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Longer than this the rate is still rising when it should fall: a warm-up in steps, copied from a run that was longer.
MAX_WARMUP_SHARE = 0.2
# Below so many updates no rate of the usual ranges gets anywhere. lc25000 takes 46, demo 29.
MIN_STEPS = 20
# A rate is said to be wrong only so many times above or below what is usual.
TOLERANCE = 3
# Towers below this take more: Adam's best rate falls as towers widen (Yang et al. 2022, arXiv 2203.03466), and 3e-4 is
# right for the 3 M and 23 M parameters of the experiments lc25000 and demo (docs/recipes.md).
SMALL_TOWER = 50_000_000


@dataclass(frozen=True)
class RateRange:
    """Rates at which AdamW trains a tower, as public recipes have them (docs/recipes.md)."""

    least: float
    most: float
    advised: float
    words: str

    def times(self, least: float, most: float) -> RateRange:
        return RateRange(self.least * least, self.most * most, self.advised * most, self.words)


# QuiltNet-B-32's descendants 5e-6, KEP and KEEP 1e-5, FLYP 1e-5, WiSE-FT 3e-5, PLIP 5e-5.
FULL = RateRange(1e-6, 1e-4, 1e-5, "fine-tuning of a large pretrained tower")
SMALL = RateRange(1e-5, 1e-3, 3e-4, "fine-tuning of a small pretrained tower")
# CLIP's ViT-B/32 and BiomedCLIP 5e-4, LiT's text towers 1e-3.
UNTRAINED = RateRange(1e-4, 1e-3, 5e-4, "a tower that begins with random weights")
# Hu et al. 2021: 2e-4 (GPT-2, GPT-3) to 5e-4 (RoBERTa). A matrix of rank r begins at zero and must go further.
LORA = RateRange(5e-5, 2e-3, 2e-4, "LoRA")
# eva's linear heads 3e-4; benchmarks/duplicates.py here 1e-3.
PROJECTION = RateRange(1e-4, 1e-2, 1e-3, "projections alone")

# How much smaller or larger an optimiser's rates are than AdamW's; nothing is said of those that are not here.
# Lion: three to ten times smaller (Chen et al. 2023, sec. 5). Muon's updates have the size of AdamW's here.
OPTIMIZERS = {"adamw": (1.0, 1.0), "adam": (1.0, 1.0), "muon": (1.0, 1.0), "lion": (0.1, 1 / 3)}


@dataclass(frozen=True)
class TowerPlan:
    """What a run does to one tower.

    Attributes:
        tuning: full, last_n, lora, projection_only or frozen.
        rate: the highest learning rate of its blocks; with ``projection_only`` that of the projection.
        parameters: of the whole tower, trained or not.
        pretrained: whether it begins with weights that were learned.
    """

    tuning: str
    rate: float
    parameters: int
    pretrained: bool


@dataclass(frozen=True)
class RunPlan:
    """The facts of a run that ``plan_warnings`` judges; samples are pairs over all ranks.

    Attributes:
        optimizer: timm's name of it.
        towers: by name, image and text.
    """

    total_samples: int
    warmup_samples: int
    samples_per_epoch: int
    global_batch_size: int
    optimizer: str
    towers: Mapping[str, TowerPlan]

    @property
    def steps(self) -> int:
        return self.total_samples // self.global_batch_size

    @property
    def epochs(self) -> float:
        return self.total_samples / self.samples_per_epoch


def plan_warnings(plan: RunPlan) -> list[str]:
    """One sentence for each thing that will probably go wrong; nothing for a run of few steps within an epoch.

    Such a run tries whether the line holds (``debug=fast``), and learns nothing in any case.
    """
    if plan.steps < MIN_STEPS and plan.epochs < 1:
        return []
    towers = [warning for name, tower in plan.towers.items() for warning in _of_tower(name, tower, plan.optimizer)]
    return [*towers, *_of_clock(plan)]


def usual_rates(tower: TowerPlan, optimizer: str = "adamw") -> RateRange | None:
    """Of a tower that learns; None where nothing is known of such an optimiser, or nothing is to learn."""
    factors = OPTIMIZERS.get(optimizer)
    if factors is None or tower.tuning == "frozen":
        return None
    if tower.tuning in ("lora", "projection_only"):
        usual = {"lora": LORA, "projection_only": PROJECTION}[tower.tuning]
    elif not tower.pretrained:
        usual = UNTRAINED
    else:
        usual = SMALL if tower.parameters < SMALL_TOWER else FULL
    return usual.times(*factors)


def _of_tower(name: str, tower: TowerPlan, optimizer: str) -> list[str]:
    if not tower.pretrained and tower.tuning not in ("full", "last_n"):
        return [
            f"the {name} tower begins with random weights and tuning.{name}={tower.tuning} keeps them; "
            f"give it pretrained weights (model.pretrained, model.{name}.pretrained), or tuning.{name}=full"
        ]
    usual = usual_rates(tower, optimizer)
    if usual is None or usual.least / TOLERANCE <= tower.rate <= usual.most * TOLERANCE:
        return []
    is_high = tower.rate > usual.most
    consequence = "it may forget what it knew within an epoch" if tower.pretrained else "it may not converge"
    return [
        f"the {name} tower ({tower.parameters / 1e6:.0f} M parameters) learns at {tower.rate:.3g}; for {usual.words} "
        f"{usual.least:.2g} to {usual.most:.2g} is usual with {optimizer}, so "
        + (consequence if is_high else "it will hardly move")
        + f"; try {usual.advised:.2g} (optim.lr, or optim.{name}_lr_factor for this tower alone)"
    ]


def _of_clock(plan: RunPlan) -> list[str]:
    warnings = []
    share = plan.warmup_samples / plan.total_samples
    if share > MAX_WARMUP_SHARE:
        warnings.append(
            f"the warm-up of {plan.warmup_samples:,} samples is {share:.0%} of the run's {plan.total_samples:,}; "
            "5 to 10 % is usual, and schedule.warmup_samples=null takes 5 %"
        )
    if plan.global_batch_size > plan.samples_per_epoch:
        warnings.append(
            f"global_batch_size={plan.global_batch_size:,} is more than the {plan.samples_per_epoch:,} samples there "
            "are: a batch holds some of them twice, as negatives of themselves; take a smaller one"
        )
    if plan.steps < MIN_STEPS:
        warnings.append(
            f"the run has {plan.steps} steps in {plan.epochs:.3g} epochs, too few updates to learn from; take a "
            "smaller global_batch_size, or more epochs"
        )
    return warnings
