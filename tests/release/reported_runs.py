"""Run directories as training leaves them, with whatever a hostile data set could put into them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

SCRIPT = "<script>document.title = 'hacked'</script>"
BREAK_OUT = "</style></script><img src=x onerror=\"document.title='hacked'\">"
CLASSES = ["adipose", SCRIPT, "mucus"]
TOKEN = "hf_" + "a1B2c3D4" * 5
SIGNED = "https://bucket.s3.amazonaws.com/a.tar?X-Amz-Signature=0123456789abcdef0123"

ENVIRONMENT = {
    "command": ["train.py", "run_name=demo", f"hub.token={TOKEN}", "data.train.shards=/scans/smith_john"],
    "time": "2026-11-28T18:17:00+0000",
    "git": "265cd3420a60610535ed6c932a3d0e947e92952c-dirty",
    "python": "3.11.7",
    "packages": {"torch": "2.14.1", "attrs": "26.1.0"},
    "world_size": 2,
    "cpus": 2,
    "gpus": ["NVIDIA H100", "NVIDIA H100"],
    "data": {"samples": 736, "tars": 1},
}


def outcome(**scores: float) -> dict[str, Any]:
    return {"scores": scores, "intervals": {name: [value - 0.1, value + 0.1] for name, value in scores.items()}}


def results(**more: Any) -> dict[str, Any]:
    zeroshot = {
        **outcome(balanced_accuracy=0.9, accuracy=0.6),
        "per_class": {name: {} for name in CLASSES},
        "confusion_matrix": [[8, 2, 0, 0], [0, 0, 0, 0], [1, 1, 7, 1]],
        "undefined": {"auroc": "one class has no image"},
    }
    outcomes = {
        "zeroshot_tissue": zeroshot,
        "val_pairs": {"scores": {"loss": 1.5}},
        "retrieval_val": outcome(**{"image_to_text_median_rank": 9.0}),
    }
    start = {
        "zeroshot_tissue/balanced_accuracy": 0.3,
        "zeroshot_tissue/accuracy": 0.65,
        "val_pairs/loss": 2.5,
        "retrieval_val/image_to_text_median_rank": 3.0,
    }
    evaluators = {"zeroshot_tissue": {"prompts": {}, "dataset": {"images": 20, "split": "test"}}}
    return {"samples_seen": 640, "start": start, "outcomes": outcomes, "evaluators": evaluators} | more


def write_run(folder: Path, *, lines: int = 10, found: dict[str, Any] | None = None, **config: Any) -> Path:
    """A run of 640 samples, a line of the log every 64."""
    folder.mkdir(parents=True)
    whole = {"run_name": folder.name, "total_samples": 640, "optim": {"lr": 0.001}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if found:
        (folder / "results.json").write_text(json.dumps(found))
    log = [
        {"samples_seen": 64 * step, "train/loss": 4 / step, "train/learning_rate": 0.001, "val_pairs/loss": 3 / step}
        for step in range(1, lines + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


class Page(HTMLParser):
    """What a browser would see of a page, by the standard library."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)
        self.text += " " if tag in ("td", "th", "small") else ""
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._inside:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())
