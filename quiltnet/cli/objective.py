"""The ``loss`` and ``objective`` of a config -> what a step minimises."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig

from quiltnet.cli.train_data import STORED_TEACHER, train_sources
from quiltnet.data.teaching import stored_teacher
from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.hub import load_model
from quiltnet.training.objective import Objective
from quiltnet.training.teachers import OnlineTeacher, StoredTeacher

_PROBE = ["Hematoxylin and eosin: invasive ductal carcinoma, 20x.", ""]


def make_objective(cfg: DictConfig, model: ContrastiveModel, accelerator: Accelerator) -> Objective:
    """The objective of a run.

    Raises:
        UserError: a loss that needs a bias the model lacks, a teacher that cannot be used.
    """
    loss = instantiate(cfg.loss, _convert_="all")
    if getattr(loss, "needs_logit_bias", False):
        if model.logit_bias is None:
            raise UserError("the model has no logit_bias, which this loss adds; say model.init_logit_bias=-10")
        model.logit_bias.requires_grad_(True)
    options = {name: value for name, value in cfg.objective.items() if name != "teacher"}
    return Objective(loss, teacher=_make_teacher(cfg, model, accelerator), **options)


def _make_teacher(
    cfg: DictConfig, model: ContrastiveModel, accelerator: Accelerator
) -> StoredTeacher | OnlineTeacher | None:
    source, weight = cfg.objective.teacher, cfg.objective.distillation_weight
    if source is not None and not weight:
        raise UserError(f"objective.teacher={source} teaches nothing; say how much: objective.distillation_weight=1.0")
    if source is None:
        return None
    if source == STORED_TEACHER:
        stored = stored_teacher(train_sources(cfg.data.train))
        if stored is None:
            raise UserError(
                "objective.teacher=stored, but the shards hold no features of a teacher; "
                "write a set with them: quiltnet teach SHARDS --teacher outputs/run --out DIR"
            )
        return StoredTeacher(stored["logit_scale"])
    teacher = load_model(source)
    if teacher.image_size != model.image_size:
        raise UserError(
            f"the teacher sees images of {teacher.image_size} pixels, the model of {model.image_size}; "
            "they must be alike, or the teacher's features stored in the shards"
        )
    same_length = teacher.tokenize.context_length == model.tokenize.context_length
    if not same_length or not torch.equal(teacher.tokenize(_PROBE), model.tokenize(_PROBE)):
        raise UserError(
            f"the teacher {source} reads other tokens than the model; "
            "take one with the same tokeniser and context_length, or store its features in the shards"
        )
    return OnlineTeacher(teacher, micro_batch_size=cfg.micro_batch_size, autocast=accelerator.autocast)
