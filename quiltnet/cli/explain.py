"""``quiltnet explain``: why a model finds an image and a text similar, as a figure.

The wings are imported where they are used: ``quiltnet --help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quiltnet.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from quiltnet.model.contrastive import ContrastiveModel

ENDINGS = (".png", ".jpg", ".jpeg", ".svg", ".pdf")


def explain(
    image: Annotated[list[Path], typer.Option(help="File of an image; repeat it for more rows.")],
    text: Annotated[list[str], typer.Option(help="Text of the image, in the same order.")],
    model: Annotated[
        str, typer.Option(help="Run directory (RUN@best, RUN@ema), checkpoint, or anything that quiltnet.load takes.")
    ],
    out: Annotated[Path, typer.Option(help="Figure to write: .png, .jpg, .svg or .pdf.")],
    compare: Annotated[str | None, typer.Option(help="Another model, shown beside the first.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Show what in an image and which words of a text make a model find them similar."""
    _check(image, text, out, overwrite)
    pictures = [_read(file) for file in image]
    from quiltnet.release.explain_figure import explain_figure, save_figure
    from quiltnet.release.explaining import explain
    from quiltnet.release.hub import load_model

    explanations = {}
    for source in [model] if compare is None else [model, compare]:
        loaded = load_model(source)
        _say_what_is_cut(loaded, text, source)
        explanations[_title(source, model, compare)] = [
            explain(loaded, picture, caption) for picture, caption in zip(pictures, text, strict=True)
        ]
    for row, (file, caption) in enumerate(zip(image, text, strict=True)):
        similarities = ", ".join(f"{title} {rows[row].similarity:.3f}" for title, rows in explanations.items())
        print(f'{file.name}, "{caption}": similarity {similarities}')
    save_figure(explain_figure(explanations), out)
    print(out)


def _check(images: Sequence[Path], texts: Sequence[str], out: Path, overwrite: bool) -> None:
    """What can be known before torch is imported."""
    from quiltnet.cli.run_directory import check_out_file

    if len(images) != len(texts):
        raise UserError(
            f"{len(images)} --image and {len(texts)} --text: each row of the figure is one of each; repeat an image "
            "that has several texts"
        )
    if not all(text.strip() for text in texts):
        raise UserError("a --text is empty; say what the image may show")
    missing = next((file for file in images if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"--image {missing} is no file; give the path of an image")
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {out} will be a figure; let its name end in one of {', '.join(ENDINGS)}")
    check_out_file(out, overwrite=overwrite)


def _read(file: Path) -> Image.Image:
    from quiltnet.data.decoding import BrokenSample, decode_pil

    try:
        return decode_pil(file.read_bytes())
    except (BrokenSample, OSError) as error:
        raise UserError(f"cannot read --image {file} ({error}); give a whole JPEG, PNG or TIFF") from error


def _say_what_is_cut(model: ContrastiveModel, texts: Sequence[str], source: str) -> None:
    for text in texts:
        length = model.tokenize.count_tokens(text)
        if length > model.tokenize.context_length:
            print(f'{source} reads {model.tokenize.context_length} of {length} tokens of "{text}"')


def _title(source: str, model: str, compare: str | None) -> str:
    """The last part of a path, unless both end so."""
    names = [Path(name).name for name in (model, compare or "")]
    return source if names[0] == names[1] else Path(source).name
