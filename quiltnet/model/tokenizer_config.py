"""What a tokeniser's own configuration may name: files that lie with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import get_tokenizer_config

from quiltnet.errors import UserError

NAME = "tokenizer_config.json"
_FILES = ("_file", "_files")  # endings of keys that name files: vocab_file, tokenizer_file, fast_tokenizer_files
_CONTENT_OR_FILES = {"vocab", "merges", "init_inputs"}
# Left in many published folders, with a place on its maker's machine; transformers never opens it.
_NOT_OPENED = {"special_tokens_map_file"}


def check_tokenizer_config(name_or_folder: str) -> None:
    """That no file elsewhere would be read as a vocabulary: transformers opens some names as they stand, or all (5.0).

    A name is taken from the folder and from the working directory. One of no file here is passed over, since folders
    of the hub name files of the machine that they were made on.

    Raises:
        UserError: one is named, or the configuration cannot be read.
    """
    folder = Path(name_or_folder)
    place = folder / NAME if folder.is_dir() else f"{NAME} of {name_or_folder}"
    try:
        names = list(_file_names(get_tokenizer_config(name_or_folder)))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{place} is no JSON object ({error})") from error
    for key, name in names:
        for file in (folder / name, Path(name)):
            if os.path.isfile(file) and not file.parent.resolve().is_relative_to(folder.resolve()):
                raise UserError(
                    f"{place}: {key} is {name}, outside of the folder; put the file that it means into the folder, "
                    "and its name alone into the configuration"
                )


def _file_names(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, name), of values that are opened where they are names of files."""
    for key, value in config.items():
        if key in _CONTENT_OR_FILES or (key.endswith(_FILES) and key not in _NOT_OPENED):
            values = value if isinstance(value, list) else [value]
            yield from ((key, name) for name in values if isinstance(name, str))
