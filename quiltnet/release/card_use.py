"""The part of a model card that says how to load the folder, with each library that its files are for."""

from __future__ import annotations

import json
import re
from pathlib import Path

from quiltnet.model.folder import CONFIG_NAME
from quiltnet.release.card_text import plain

_NAME = re.compile(r"[\w.-]+")
_BEGIN, _END = "<!-- use -->", "<!-- end of use -->"
_TRANSFORMERS_CLASSES = {"CLIPModel": "CLIPProcessor"}

_LABELS = 'labels = ["adipose tissue", "smooth muscle", "lymphoid tissue"]'
_PROMPTS = '[f"a histopathology image of {label}" for label in labels]'
_QUILTNET = f"""\
import quiltnet
from PIL import Image

model = quiltnet.load("SOURCE")
{_LABELS}
image_features = model.encode_images([Image.open("tile.png")])  # (1, D), unit length
text_features = model.encode_text({_PROMPTS})  # (3, D)
print(dict(zip(labels, (image_features @ text_features.T)[0].tolist())))
"""
_OPEN_CLIP = f"""\
import open_clip
import torch
from PIL import Image

model, _, transform = open_clip.create_model_and_transforms("SOURCE")
tokenize = open_clip.get_tokenizer("SOURCE")
model.eval()
{_LABELS}
with torch.no_grad():
    image_features = model.encode_image(transform(Image.open("tile.png"))[None], normalize=True)
    text_features = model.encode_text(tokenize({_PROMPTS}), normalize=True)
    logits = model.logit_scale.exp() * image_features @ text_features.T  # (1, 3)
print(dict(zip(labels, logits.softmax(dim=-1)[0].tolist())))
"""
_TRANSFORMERS = f"""\
import torch
from PIL import Image
from transformers import MODEL, PROCESSOR

model = MODEL.from_pretrained("SOURCE").eval()
process = PROCESSOR.from_pretrained("SOURCE")
{_LABELS}
inputs = process(
    images=Image.open("tile.png").convert("RGB"),
    text={_PROMPTS},
    padding=True,
    truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**inputs).logits_per_image  # (1, 3)
print(dict(zip(labels, logits.softmax(dim=-1)[0].tolist())))
"""

_ONNX = f"""\
import json
from pathlib import Path

import numpy as np
import onnxruntime
FETCH
from PIL import Image, ImageOps
from tokenizers import Tokenizer

folder = Path(SOURCE)
inputs = json.loads((folder / "onnx/inputs.json").read_text())
(_, _, height, width), (_, length) = inputs["image"]["shape"], inputs["text"]["shape"]
image = ImageOps.fit(Image.open("tile.png").convert("RGB"), (width, height), Image.Resampling.BICUBIC)
pixels = (np.asarray(image, np.float32) / 255 - inputs["image"]["mean"]) / inputs["image"]["std"]
{_LABELS}
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(length)
tokenizer.enable_padding(length=length, pad_id=inputs["text"]["pad_id"] or 0)
encoded = tokenizer.encode_batch({_PROMPTS})
text = np.array([encoding.ids for encoding in encoded])  # (3, L)
encode_image = onnxruntime.InferenceSession(folder / "onnx/image_encoder.onnx")
encode_text = onnxruntime.InferenceSession(folder / "onnx/text_encoder.onnx")
(image_features,) = encode_image.run(None, {{"image": pixels.astype(np.float32).transpose(2, 0, 1)[None]}})
(text_features,) = encode_text.run(None, {{"text": text}})
weights = np.exp(inputs["logit_scale"] * (image_features @ text_features.T)[0])
print(dict(zip(labels, (weights / weights.sum()).tolist())))
"""


def libraries_of(folder: Path) -> list[str]:
    """The libraries that ``folder`` has files for, by the hub's names, the first one first."""
    has = {
        "open_clip": (folder / CONFIG_NAME).is_file(),
        "transformers": _transformers_class(folder) is not None,
        "onnx": any(folder.rglob("*.onnx")),
    }
    return [name for name, is_there in has.items() if is_there]


def use_section(folder: Path, name: str, repository: str | None = None) -> str:
    """How to load ``folder``, or the repository that it was pushed to, with code that runs as it stands.

    Args:
        name: of the folder, as it will be.
    """
    beside = "" if repository else f"Run beside the folder {plain(name)}. "
    blocks = "\n".join(f"### {library}\n\n```python\n{code}```\n" for library, code in _codes(folder, name, repository))
    return f"{_BEGIN}\n## How to use\n\n{beside}`tile.png` is an image of yours.\n\n{blocks}{_END}"


def has_use_section(card: str) -> bool:
    """Whether the card is one of these."""
    return 0 <= card.find(_BEGIN) < card.find(_END)


def replace_use(card: str, folder: Path, repository: str) -> str:
    """``card`` with code that loads from ``repository``; as it was where its owner took that section out."""
    if not has_use_section(card):
        return card
    before, _, rest = card.partition(_BEGIN)
    return before + use_section(folder, folder.name, repository) + rest.partition(_END)[2]


def _codes(folder: Path, name: str, repository: str | None) -> list[tuple[str, str]]:
    local = name if _NAME.fullmatch(name) else "path/of/the/folder"  # an odd name could end the code that it goes into
    libraries = libraries_of(folder)
    codes = []
    if {"open_clip", "transformers"} & set(libraries):
        codes.append(("quiltnet", _QUILTNET.replace("SOURCE", f"hub:{repository}" if repository else local)))
    if "open_clip" in libraries:
        source = f"hf-hub:{repository}" if repository else f"local-dir:{local}"
        codes.append(("open_clip", _OPEN_CLIP.replace("SOURCE", source)))
    if model_class := _transformers_class(folder):
        code = _TRANSFORMERS.replace("MODEL", model_class).replace("PROCESSOR", _TRANSFORMERS_CLASSES[model_class])
        codes.append(("transformers", code.replace("SOURCE", repository or local)))
    if "onnx" in libraries:
        source = f'snapshot_download("{repository}")' if repository else f'"{local}"'
        fetch = "from huggingface_hub import snapshot_download\n" if repository else ""
        codes.append(("onnxruntime", _ONNX.replace("FETCH\n", fetch).replace("SOURCE", source)))
    return codes


def _transformers_class(folder: Path) -> str | None:
    """The class that ``config.json`` names, of those that an export may have."""
    path = folder / "config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("architectures") if path.is_file() else None
    return next((name for name in named or [] if name in _TRANSFORMERS_CLASSES), None)
