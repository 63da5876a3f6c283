"""Warnings come where runs are known to fail, and not where they are known to work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quiltnet.training.run_plan import RunPlan, TowerPlan, plan_warnings, usual_rates

VIT_B = TowerPlan("full", rate=1e-5, parameters=86_000_000, pretrained=True)
BERT = replace(VIT_B, parameters=63_000_000)
QUILTNET = RunPlan(
    total_samples=4_000_000,
    warmup_samples=200_000,
    samples_per_epoch=1_000_000,
    global_batch_size=1024,
    optimizer="adamw",
    towers={"image": VIT_B, "text": BERT},
)
SMALL = replace(VIT_B, rate=3e-4, parameters=4_000_000)
LC25000 = RunPlan(2_944, 147, 736, 64, "adamw", {"image": SMALL, "text": replace(SMALL, parameters=23_000_000)})


def with_towers(plan: RunPlan = QUILTNET, **changes) -> RunPlan:
    return replace(plan, towers={name: replace(tower, **changes) for name, tower in plan.towers.items()})


@pytest.mark.parametrize(
    "plan",
    [
        QUILTNET,
        LC25000,
        with_towers(rate=5e-6),  # QuiltNet's descendants
        with_towers(rate=5e-5),  # PLIP
        with_towers(tuning="lora", rate=5e-4),  # RoBERTa's in LoRA's paper
        with_towers(tuning="projection_only", rate=1e-3),  # benchmarks/duplicates.py
        with_towers(rate=5e-4, pretrained=False),  # CLIP, BiomedCLIP
        replace(with_towers(rate=3e-6), optimizer="lion"),
        replace(with_towers(rate=1e3), optimizer="sgd"),  # of which nothing is known here
        replace(QUILTNET, towers={"image": replace(VIT_B, tuning="frozen", rate=1.0), "text": BERT}),
        replace(with_towers(rate=3e-4), total_samples=1600, global_batch_size=16, warmup_samples=0),  # debug=overfit
        replace(with_towers(rate=1e-2), total_samples=16, global_batch_size=8, warmup_samples=8),  # debug=fast
    ],
)
def test_what_is_known_to_work_is_let_be(plan):
    assert plan_warnings(plan) == []


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (with_towers(rate=5e-4), "86 M parameters) learns at 0.0005; for fine-tuning of a large pretrained tower"),
        (with_towers(rate=1e-3), "it may forget what it knew within an epoch; try 1e-05"),
        (with_towers(tuning="lora", rate=1e-5), "LoRA 5e-05 to 0.002 is usual with adamw, so it will hardly move"),
        (with_towers(tuning="projection_only", rate=1e-5), "projections alone"),
        (with_towers(rate=1e-5, pretrained=False), "begins with random weights 0.0001 to 0.001 is usual"),
        (with_towers(LC25000, rate=5e-3), "a small pretrained tower"),
        (replace(with_towers(rate=3e-4), optimizer="lion"), "1e-07 to 3.3e-05 is usual with lion"),
        (with_towers(tuning="frozen", pretrained=False), "tuning.image=frozen keeps them"),
        (with_towers(tuning="lora", rate=5e-4, pretrained=False), "tuning.image=lora keeps them"),
        (replace(QUILTNET, warmup_samples=1_000_000), "1,000,000 samples is 25% of the run's 4,000,000"),
        (replace(LC25000, global_batch_size=1024), "global_batch_size=1,024 is more than the 736 samples there are"),
        (replace(LC25000, global_batch_size=256), "the run has 11 steps in 4 epochs"),
    ],
)
def test_what_is_known_to_fail_is_told(plan, words):
    assert words in plan_warnings(plan)[0]


def test_each_tower_is_judged_by_its_own_tuning_and_rate():
    towers = {"image": replace(VIT_B, tuning="frozen"), "text": replace(BERT, rate=1e-3)}
    warnings = plan_warnings(replace(QUILTNET, towers=towers))
    assert len(warnings) == 1 and "optim.text_lr_factor" in warnings[0]


def test_the_advised_rate_is_never_warned_of():
    for tuning in ("full", "last_n", "lora", "projection_only"):
        for optimizer in ("adamw", "muon", "lion"):
            for parameters in (4_000_000, 86_000_000):
                tower = TowerPlan(tuning, 1e-5, parameters, pretrained=True)
                usual = usual_rates(tower, optimizer)
                assert usual.least <= usual.advised <= usual.most
