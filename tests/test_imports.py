"""The architecture as a test: who may import whom, and which library stays in which room (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "quiltnet"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# What every reader of a labelled set builds on, and every classifier that is scored.
SET_READING = {
    f"evaluation.{room}" for room in ("class_names", "image_files", "label_table", "labelled_set", "split_roles")
}
SCORING = {
    f"evaluation.{room}"
    for room in (
        "bootstrap", "classification", "features", "labelled_set", "metrics", "outcome", "retrieval_metrics",
        "train_sets"
    )
}  # fmt: skip

# Room -> what it may import of quiltnet. `errors` and `whole_files` are open to all; a wing's __init__ imports nothing.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "distributed": set(),
    "worker_signals": set(),
    "image_opening": set(),
    "redaction": set(),
    "whole_files": set(),
    "model.adapters": {"model.contrastive", "model.lora", "model.tower_blocks"},
    "model.attention_relevance": set(),
    "model.backbone_features": set(),
    "model.image_relevance": {"model.attention_relevance"},
    "model.text_relevance": {"model.attention_relevance", "model.image_relevance", "model.text_forward"},
    "model.relevance": {"model.contrastive", "model.image_relevance", "model.text_relevance"},
    "model.contrastive": {
        "model.backbone_features", "model.text_forward", "model.tokenizer", "model.tower_blocks"
    },
    "model.fast_bpe": {"model.text_cleaning"},
    "model.lora": {"model.lora_attention", "model.tower_blocks"},
    "model.lora_attention": set(),
    "model.patch_dropout": set(),
    "model.text_cleaning": set(),
    "model.text_forward": set(),
    "model.tokenizer": {"model.fast_bpe", "model.text_cleaning", "model.tokenizer_config"},
    "model.tokenizer_config": set(),
    "model.tower_blocks": set(),
    "model.changes": {"model.contrastive", "model.image_size"},
    "model.image_size": {"model.weights"},
    "model.published_layouts": {"model.contrastive"},
    "model.timm_folder": {"model.weights"},
    "model.torchscript": set(),
    "model.towers": {"model.image_size", "model.timm_folder", "model.tokenizer", "model.weights"},
    "model.weights": {"model.torchscript"},
    "model.embedder": {"model.contrastive"},
    "model.folder": {"model.adapters", "model.contrastive", "model.published_layouts", "model.timm_folder"},
    "model.architecture": {
        "model.contrastive", "model.folder", "model.published_layouts", "model.timm_folder", "model.weights"
    },
    "model.assembly": {
        "model.architecture", "model.changes", "model.contrastive", "model.image_size", "model.published_layouts",
        "model.tokenizer", "model.towers", "model.weights"
    },
    "model.loading": {
        "model.adapters", "model.assembly", "model.changes", "model.contrastive", "model.folder",
        "model.published_layouts", "model.weights"
    },
    "model.transformers_clip": {
        "model.assembly", "model.changes", "model.contrastive", "model.tokenizer", "model.transformers_weights",
        "model.weights"
    },
    "model.transformers_weights": set(),
    "data.augmentation": {"data.stain"},
    "data.batches": {
        "data.decoding", "data.device_decoding", "data.pairs", "data.stored_pairs", "data.teacher_features",
        "data.transforms"
    },
    "data.captions": {"data.sentences"},
    "data.cells": set(),
    "data.check_report": {"data.checking", "data.contact_sheet", "data.decoding", "data.near_duplicates"},
    "data.checking": {
        "data.copies", "data.evaluation_sets", "data.examining", "data.near_duplicates", "data.shard_sets",
        "data.worker_pool"
    },
    "data.contact_sheet": set(),
    "data.copies": {"data.near_duplicates"},
    "data.decoding": {"image_opening"},
    "data.device_decoding": {"data.decoding", "data.transforms"},
    "data.evaluation_sets": {
        "data.examining", "data.image_files", "data.manifest", "data.shard_sets", "data.stored_pairs", "data.tables"
    },
    "data.examining": {
        "data.decoding", "data.manifest", "data.near_duplicates", "data.pairs", "data.stored_pairs", "data.tar_index",
        "image_opening"
    },
    "data.folders": {"data.image_files", "data.pairs", "data.row_table"},
    "data.held_out": {"data.decoding", "data.shard_files", "data.stored_pairs"},
    "data.image_files": {"data.zipped_images"},
    "data.ledger": set(),
    "data.local_pairs": {"data.mixing", "data.shard_files", "data.stored_pairs"},
    "data.manifest": set(),
    "data.mixing": {"data.permutation"},
    "data.near_duplicates": set(),
    "data.packing": {"data.ledger", "data.planning", "data.shard_writer", "data.tar_index", "data.worker_pool"},
    "data.pairs": set(),
    "data.permutation": set(),
    "data.planning": {"data.ledger", "data.pairs", "data.row_table"},
    "data.prefetching": {"data.batches", "data.device_decoding"},
    "data.prepared_images": {"data.decoding"},
    "data.prepared_shards": {
        "data.decoding", "data.ledger", "data.manifest", "data.pairs", "data.prepared_images", "data.stored_pairs",
        "data.tar_index"
    },
    "data.preparing": {
        "__version__", "data.ledger", "data.manifest", "data.prepared_images", "data.prepared_shards",
        "data.shard_files", "data.shard_sets", "data.tar_index", "data.worker_pool", "data.workplace"
    },
    "data.quilt1m": {"data.tables"},
    "data.reading": {
        "data.batches", "data.captions", "data.local_pairs", "data.remote_shards", "data.shard_files",
        "data.streamed_pairs", "data.watchdog", "distributed", "worker_signals"
    },
    "data.remote_files": {"data.remote_sources"},
    "data.remote_shards": {"data.manifest", "data.remote_files", "data.remote_sources"},
    "data.remote_sources": set(),
    "data.repacking": {
        "data.decoding", "data.folders", "data.image_files", "data.manifest", "data.pairs", "data.row_table",
        "data.stored_pairs", "data.tar_index", "data.tar_members", "data.tarred_images"
    },
    "data.row_table": {"data.cells", "data.pairs"},
    "data.samples": {"data.image_files", "data.pairs", "image_opening"},
    "data.selection": {"data.pairs", "data.row_table", "data.tables"},
    "data.sentences": set(),
    "data.shard_cache": {"data.pairs", "data.remote_files", "data.remote_shards", "data.remote_sources"},
    "data.shard_files": {"data.manifest"},
    "data.shard_sets": {"data.manifest"},
    "data.shard_writer": {
        "data.image_files", "data.ledger", "data.manifest", "data.planning", "data.row_table", "data.samples",
        "data.worker_pool"
    },
    "data.shards": {
        "__version__", "data.image_files", "data.ledger", "data.manifest", "data.packing", "data.planning",
        "data.row_table", "data.shard_writer", "data.workplace"
    },
    "data.source_pattern": set(),
    "data.stain": set(),
    "data.stored_pairs": {
        "data.decoding", "data.pairs", "data.shard_files", "data.tar_index", "data.teacher_features"
    },
    "data.stream_order": set(),
    "data.stream_windows": {
        "data.decoding", "data.remote_files", "data.remote_shards", "data.remote_sources", "data.stored_pairs",
        "data.stream_order", "data.tar_stream"
    },
    "data.streamed_pairs": {
        "data.mixing", "data.remote_shards", "data.remote_sources", "data.shard_cache", "data.stored_pairs",
        "data.streaming"
    },
    "data.streaming": {
        "data.remote_files", "data.remote_shards", "data.remote_sources", "data.shard_cache", "data.stored_pairs",
        "data.stream_order", "data.stream_windows"
    },
    "data.synthetic": {"data.synthetic_captions", "data.synthetic_tissue"},
    "data.synthetic_canvas": set(),
    "data.synthetic_captions": {"data.synthetic_tissue"},
    "data.synthetic_tissue": {"data.synthetic_canvas"},
    "data.tables": {"data.cells", "data.row_table"},
    "data.tar_index": {"data.tar_members"},
    "data.tar_members": set(),
    "data.tar_stream": {"data.tar_index"},
    "data.tarred_images": {"data.pairs", "data.tar_members"},
    "data.teacher_features": {"data.decoding"},
    "data.teaching": {
        "data.decoding", "data.manifest", "data.remote_files", "data.remote_shards", "data.remote_sources",
        "data.shard_files", "data.shard_sets", "data.stored_pairs", "data.tar_index", "data.teacher_features",
        "data.workplace"
    },
    "data.transforms": {"data.decoding"},
    "data.watchdog": set(),
    "data.worker_pool": set(),
    "data.workplace": {"data.manifest"},
    "data.zipped_images": {"data.pairs", "data.tarred_images"},
    "training.alarms": {
        "distributed", "training.averaging", "training.callbacks", "training.engine", "training.loggers"
    },
    "training.averaging": set(),
    "training.best_weights": {
        "distributed", "training.callbacks", "training.checkpoint", "training.engine", "training.full_state"
    },
    "training.checkpoint": {"training.checkpoint_manifest", "training.random_state", "training.tensor_tree"},
    "training.checkpoint_copies": {"training.checkpoint_manifest"},
    "training.checkpoint_manifest": set(),
    "training.distillation": {"distributed", "training.kernels", "training.targets"},
    "training.duplicates": {"distributed"},
    "training.engine": {
        "distributed", "training.averaging", "training.full_state", "training.gradcache", "training.gradients",
        "training.optim", "training.placement", "training.precision", "training.random_state", "training.stage",
        "training.stopping"
    },
    "training.early_stopping": {"distributed", "training.callbacks", "training.engine", "training.loggers"},
    "training.finite_check": {"distributed", "training.engine", "training.loggers"},
    "training.flops": set(),
    "training.full_state": {"distributed"},
    "training.gradcache": {"training.random_state", "training.stage"},
    "training.gradients": set(),
    "training.interpolation": set(),
    "training.kernels": {
        "distributed", "training.duplicates", "training.targets", "training.triton_kernels"
    },
    "training.loggers": {"redaction"},
    "training.losses": {"training.duplicates", "training.kernels"},
    "training.objective": {"training.distillation", "training.losses"},
    "training.optim": {"distributed", "training.parameter_groups"},
    "training.overfitting": {"distributed"},
    "training.parameter_groups": set(),
    "training.batchnorm": {"distributed", "training.engine"},
    "training.patch_dropping": {"training.engine"},
    "training.placement": {"distributed"},
    "training.precision": {"distributed", "training.process_group"},
    "training.process_group": set(),
    "training.profiling": {"distributed", "training.engine", "training.flops"},
    "training.quarantine": {"distributed", "training.engine", "training.loggers"},
    "training.random_state": set(),
    "training.retention": {"training.checkpoint"},
    "training.run_plan": set(),
    "training.saving": {
        "distributed", "training.callbacks", "training.checkpoint", "training.checkpoint_copies", "training.engine",
        "training.retention", "training.stage", "training.tensor_tree"
    },
    "training.schedules": set(),
    "training.siglip": {"training.duplicates", "training.siglip_kernels"},
    "training.siglip_kernels": {"distributed", "training.duplicates", "training.kernels"},
    "training.stage": set(),
    "training.stall_watch": {"distributed", "training.stage"},
    "training.stopping": {"distributed"},
    "training.targets": {"training.duplicates"},
    "training.thawing": {"training.engine", "training.placement"},
    "training.teachers": set(),
    "training.tensor_tree": set(),
    "training.triton_kernels": {"training.targets"},
    "training.callbacks": {
        "distributed", "training.averaging", "training.data_statistics", "training.engine", "training.flops",
        "training.loggers", "training.stopping"
    },
    "training.data_statistics": {"distributed"},
    "evaluation.bootstrap": {"evaluation.labelled_set"},
    "evaluation.calibration": set(),
    "evaluation.class_names": set(),
    "evaluation.classification": {
        "evaluation.bootstrap", "evaluation.calibration", "evaluation.labelled_set", "evaluation.metrics",
        "evaluation.outcome"
    },
    "evaluation.comparison": {"evaluation.outcome"},
    "evaluation.corruptions": {"evaluation.labelled_set"},
    "evaluation.datasets": SET_READING,
    "evaluation.feature_cache": set(),
    "evaluation.features": {"distributed", "evaluation.feature_cache", "worker_signals"},
    "evaluation.few_shot": SCORING,
    "evaluation.gallery": {"evaluation.bootstrap", "evaluation.outcome", "evaluation.retrieval_metrics"},
    "evaluation.group_split": SET_READING,
    "evaluation.h5_images": set(),
    "evaluation.image_files": set(),
    "evaluation.image_retrieval": SCORING,
    "evaluation.knn": SCORING,
    "evaluation.label_archives": SET_READING | {"evaluation.stored_images"},
    "evaluation.label_table": set(),
    "evaluation.labelled_set": {"image_opening"},
    "evaluation.linear_probe": SCORING | {"evaluation.probe", "evaluation.probe_splits"},
    "evaluation.measuring": {"distributed", "evaluation.feature_cache", "evaluation.features", "evaluation.outcome"},
    "evaluation.metrics": set(),
    "evaluation.outcome": set(),
    "evaluation.pair_tables": SET_READING,
    "evaluation.pathology_sets": SET_READING | {
        "evaluation.group_split", "evaluation.h5_images", "evaluation.published_layout"
    },
    "evaluation.pathology_tables": SET_READING | {"evaluation.published_layout"},
    "evaluation.probe": set(),
    "evaluation.probe_splits": set(),
    "evaluation.prompts": set(),
    "evaluation.published_layout": SET_READING,
    "evaluation.retrieval": {"evaluation.features", "evaluation.gallery", "evaluation.outcome"},
    "evaluation.retrieval_metrics": set(),
    "evaluation.robustness": {
        "evaluation.corruptions", "evaluation.features", "evaluation.labelled_set", "evaluation.measuring",
        "evaluation.outcome", "evaluation.variants"
    },
    "evaluation.slide_pooling": {"evaluation.labelled_set", "evaluation.metrics", "evaluation.outcome"},
    "evaluation.split_roles": {"evaluation.labelled_set"},
    "evaluation.stored_images": set(),
    "evaluation.train_sets": {"evaluation.labelled_set"},
    "evaluation.truncation": {
        "evaluation.features", "evaluation.measuring", "evaluation.outcome", "evaluation.variants"
    },
    "evaluation.val_pairs": {
        "evaluation.features", "evaluation.gallery", "evaluation.outcome", "evaluation.retrieval"
    },
    "evaluation.variants": {"evaluation.outcome"},
    "evaluation.zeroshot": SCORING | {"evaluation.prompts", "evaluation.slide_pooling"},
    "release.app": {"evaluation.prompts", "model.embedder", "release.explaining"},
    "release.app_page": {"release.app", "release.explaining"},
    "release.card": {
        "redaction", "release.card_metadata", "release.card_scores", "release.card_sections", "release.card_text",
        "release.card_use", "release.run_files"
    },
    "release.card_metadata": {"release.card_scores", "release.hub", "release.run_files"},
    "release.card_scores": {"release.run_files", "training.averaging"},
    "release.card_sections": {
        "release.card_metadata", "release.card_scores", "release.card_text", "release.run_files"
    },
    "release.card_text": set(),
    "release.card_use": {"model.folder", "release.card_text"},
    "release.charts": set(),
    "release.curves": {"release.charts"},
    "release.explaining": {"model.contrastive", "model.relevance"},
    "release.explain_figure": {"release.explaining"},
    "release.report": {
        "release.report_bars", "release.report_curves", "release.report_facts",
        "release.report_robustness", "release.report_samples", "release.report_scores", "release.report_subjects"
    },
    "release.report_bars": {"release.report_subjects", "training.averaging"},
    "release.report_curves": {"evaluation.comparison", "release.report_scores", "release.report_subjects"},
    "release.report_facts": {"redaction", "release.report_subjects", "release.run_files"},
    "release.report_robustness": {"release.report_curves", "release.report_subjects"},
    "release.report_samples": {
        "evaluation.features", "evaluation.gallery", "evaluation.measuring", "model.contrastive", "release.explaining"
    },
    "release.report_scores": {"evaluation.comparison", "release.report_subjects", "training.averaging"},
    "release.report_subjects": {"redaction", "release.run_files", "training.averaging"},
    "release.run_files": set(),
    "release.sweep_plots": {"release.charts"},
    "release.whole_folder": set(),
    "release.comparison": {"model.contrastive"},
    "release.downloading": {"model.folder", "model.timm_folder", "model.weights"},
    "release.exporting": {
        "model.adapters", "model.contrastive", "model.folder", "release.comparison", "release.onnx_export",
        "release.open_clip_export", "release.transformers_export", "release.transformers_layout", "release.whole_folder"
    },
    "release.hub": {
        "model.assembly", "model.changes", "model.contrastive", "model.embedder", "model.folder", "model.loading",
        "model.transformers_clip", "release.downloading", "training.averaging", "training.checkpoint"
    },
    "release.hub_calls": {"redaction"},
    "release.push": {"release.card", "release.card_use", "release.hub_calls"},
    "release.onnx_export": {
        "__version__", "model.contrastive", "model.text_forward", "release.comparison", "release.tokenizer_files"
    },
    "release.open_clip_export": {
        "model.contrastive", "model.folder", "model.timm_folder", "release.comparison", "release.tokenizer_files"
    },
    "release.tokenizer_files": {"model.tokenizer"},
    "release.transformers_export": {
        "model.contrastive", "model.transformers_clip", "model.transformers_weights", "release.comparison",
        "release.tokenizer_files", "release.transformers_layout"
    },
    "release.transformers_layout": {"model.contrastive", "model.transformers_clip", "release.tokenizer_files"},
    "__init__": {"release.hub"},
}  # fmt: skip

# Third parties that stay in one place, whatever the room's other freedoms.
CONFINED = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "wandb": {"training.loggers"},
    "typer": {"cli"},
    "webdataset": {"data"},
    "gradio": {"release.app_page"},
    "h5py": {"evaluation"},
    "jinja2": {"release.report"},
    "matplotlib": {"release"},
    "onnx": {"release"},
    "onnxruntime": {"release"},
    "optuna": {"cli", "release"},
    "peft": {"model"},
    "plotly": {"release"},
}


def room_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Rooms of quiltnet, and top-level names of everything else, that a file imports anywhere."""
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top != "quiltnet":
                others.add(top)
            elif rest and rest[0] not in ("errors", "whole_files"):
                is_room = len(rest) > 1 and (PACKAGE / rest[0]).is_dir()
                rooms.add(".".join(rest[:2]) if is_room else rest[0])
    return rooms, others


@pytest.mark.parametrize("path", MODULES, ids=room_of)
def test_imports_go_down_only(path):
    room = room_of(path)
    rooms, others = imports(path)
    if not room.startswith("cli"):  # the door imports everything; nothing imports it
        is_wing = path.name == "__init__.py" and path.parent != PACKAGE
        assert rooms <= (set() if is_wing else ALLOWED[room])
    for library, homes in CONFINED.items():
        if library in others:
            assert any(room == home or room.startswith(f"{home}.") for home in homes), library


def test_every_rule_has_its_room():
    assert set(ALLOWED) <= {room_of(path) for path in MODULES}
