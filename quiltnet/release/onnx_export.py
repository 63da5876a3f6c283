"""An export as two ONNX graphs, image and text encoder, and what onnxruntime makes of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from quiltnet import __version__
from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.model.text_forward import encode_causal_text, is_causal, padding_is_idle
from quiltnet.release.comparison import LIMIT, Comparison, Reference, largest_difference, largest_of
from quiltnet.release.tokenizer_files import write_tokenizer

LIBRARY = "onnxruntime"
FOLDER_NAME = "onnx"
IMAGE_NAME = "image_encoder.onnx"
TEXT_NAME = "text_encoder.onnx"
INPUTS_NAME = "inputs.json"
NEEDED = ("onnx", "onnxruntime", "onnxscript")
_BATCH_SIZES = (1, 3)
_IN_ONE_FILE = 1_900_000_000  # bytes; protobuf's own bound is 2 GB, weights of more lie in a file beside


def check_onnx() -> None:
    """Raises UserError where a package of the extra is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'quiltnet[onnx]'"
        )


class _ImageEncoder(nn.Module):
    def __init__(self, model: ContrastiveModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """image: ``(B, 3, H, W)`` float32, normalised -> ``(B, D)``, unit length."""
        return self.model.encode_image(image)


class _TextEncoder(nn.Module):
    def __init__(self, model: ContrastiveModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        """text: ``(B, L)`` int64 -> ``(B, D)``, unit length."""
        tower = getattr(self.model.clip, "text", self.model.clip)
        if is_causal(tower):  # without a case of its own for the full length, which a graph could not keep
            return nn.functional.normalize(encode_causal_text(tower, text).float(), dim=-1)
        return self.model.encode_text(text)


def write_onnx(model: ContrastiveModel, folder: Path) -> None:
    """``onnx/``: two graphs of any batch size, and ``inputs.json``, which says what they are fed; tokeniser files.

    Texts may be shorter than the context length where padding is idle in the text tower.
    """
    inside = folder / FOLDER_NAME
    inside.mkdir(parents=True)
    write_tokenizer(model.tokenize, folder)
    inputs = describe_inputs(model)
    (inside / INPUTS_NAME).write_text(json.dumps(inputs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    stated = {
        "logit_scale": repr(model.logit_scale.item()),
        "inputs": json.dumps(inputs),
        "producer": f"quiltnet {__version__}",
    }
    pixels = torch.stack([model.transform(image) for image in _two_images(model)])
    _write_graph(_ImageEncoder(model), {"image": pixels}, {0: "batch"}, inside / IMAGE_NAME, stated)
    text = model.tokenize(["fatty tissue", "a gland"])
    dynamic = {0: "batch"}
    if inputs["text"]["may_be_shorter"]:
        dynamic[1], text = "length", text[:, : max(3, text.shape[1] // 2)]
    _write_graph(_TextEncoder(model), {"text": text}, dynamic, inside / TEXT_NAME, stated)


def describe_inputs(model: ContrastiveModel) -> dict[str, Any]:
    """What the graphs take and give, for whoever has no Python: JSON types."""
    cfg = model.description.preprocess_cfg
    side = model.image_size
    height, width = (side, side) if isinstance(side, int) else side
    bias = model.logit_bias
    return {
        "image": {
            "shape": ["batch", 3, height, width],
            "dtype": "float32",
            "channels": "RGB",
            "resize_mode": cfg.get("resize_mode", "shortest"),
            "interpolation": cfg.get("interpolation", "bicubic"),
            "crop": None if cfg.get("resize_mode") == "squash" else "center",
            "scale": 1 / 255,
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
        },
        "text": {
            "shape": ["batch", model.tokenize.context_length],
            "dtype": "int64",
            "may_be_shorter": padding_is_idle(model.clip, model.tokenize.pad_id),
            "pad_id": model.tokenize.pad_id,
        },
        "features": {"width": model.description.model_cfg["embed_dim"], "unit_length": True},
        "logit_scale": model.logit_scale.item(),
        "logit_bias": None if bias is None else bias.item(),
    }


@torch.no_grad()
def compare_with_onnx(reference: Reference, folder: Path) -> list[Comparison]:
    """Features by onnxruntime on the CPU, one image or text at a time and several at once; texts as short as may be."""
    import onnxruntime

    inside = folder / FOLDER_NAME
    inputs = json.loads((inside / INPUTS_NAME).read_text(encoding="utf-8"))
    longest = max(reference.lengths)
    text = reference.text[:, :longest] if inputs["text"]["may_be_shorter"] else reference.text
    pairs = [
        (IMAGE_NAME, "image", reference.pixels, reference.image_features),
        (TEXT_NAME, "text", text, reference.text_features),
    ]
    differences = []
    for name, key, given, expected in pairs:
        session = onnxruntime.InferenceSession(inside / name, providers=["CPUExecutionProvider"])
        for size in _BATCH_SIZES:
            features = [session.run(None, {key: part.numpy()})[0] for part in given.split(size)]
            differences.append(largest_difference(expected, torch.cat([torch.from_numpy(part) for part in features])))
    return [Comparison(LIBRARY, largest_of(differences), LIMIT, "embeddings, one at a time and batches of 3")]


def _write_graph(
    encoder: nn.Module, example: dict[str, Tensor], dynamic: dict[int, str], path: Path, stated: dict[str, str]
) -> None:
    (key,) = example
    with torch.no_grad():
        program = torch.onnx.export(
            encoder.eval(),
            (example[key],),
            input_names=[key],
            output_names=[f"{key}_features"],
            dynamic_shapes={key: dynamic},
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(stated)
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    program.save(path, external_data=size > _IN_ONE_FILE)


def _two_images(model: ContrastiveModel) -> list[Image.Image]:
    """A graph is traced with two: of one, the number could be taken as a constant."""
    side = model.image_size if isinstance(model.image_size, int) else max(model.image_size)
    return [Image.new("RGB", (side, side), colour) for colour in ("white", "pink")]
