"""Train a model: torchrun --nproc-per-node 8 train.py run_name=b32 model=ViT-B-32 data.train.shards=quilt/train …"""

from pathlib import Path

from quiltnet.cli.hydra_main import train_main

if __name__ == "__main__":
    train_main(conf=str(Path(__file__).resolve().parent / "conf"))
