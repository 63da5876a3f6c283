"""Labelled sets that come in archives: npz files, WebDataset tars, Hugging Face data sets on disk."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from quiltnet.errors import UserError
from quiltnet.evaluation.class_names import ClassNames, bind_names, index_labels, named_labels, sort_labels
from quiltnet.evaluation.image_files import groups_in, is_image, require_once
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.split_roles import split_role
from quiltnet.evaluation.stored_images import HuggingFaceImages, Member, NpzImages, TarImages, read_members

NAMELESS = "take its images out of the set"


def npz_labels(
    file: str | Path,
    class_names: ClassNames,
    *,
    split: str = "test",
    used_as: Split | None = None,
    ordered: bool = False,
) -> LabelledSet:
    """An npz file as MedMNIST's: arrays ``SPLIT_images`` (N, H, W[, 3]) uint8 and ``SPLIT_labels`` (N,) or (N, 1).

    The classes are those of all splits, in the order of their numbers. Images are read when they are asked for; see
    ``NpzImages`` for what compression costs.

    Args:
        class_names: number -> name in prompts, or a list of names for 0, 1, 2 …
        split: train, val or test in MedMNIST (medmnist.com).
        used_as: what the images may be used for; told by the split's name where not given.
        ordered: whether the numbers are grades.

    Raises:
        UserError: no whole npz file, no such split, several labels an image, or a label without a name.
    """
    labels_of = _npz_labels(Path(file))
    if split not in labels_of:
        raise UserError(f"{file} has no split {split!r}; it has {', '.join(labels_of) or 'none'}")
    images, labels = NpzImages(file, f"{split}_images"), labels_of[split]
    if len(images) != len(labels):
        raise UserError(f"{file} has {len(images)} images and {len(labels)} labels of {split}; get it anew")
    present = sort_labels((label for labels in labels_of.values() for label in labels), class_names, f"{file}")
    names = bind_names(present, class_names, f"the labels of {file}", NAMELESS)
    return LabelledSet(
        images=images,
        labels=index_labels(labels, names),
        class_names=list(names.values()),
        names=[f"{split}/{index}" for index in range(len(labels))],
        split=split_role(split, used_as),
        is_ordered=ordered,
        origin={"file": str(file), "class_names": names, "rows": split},
    )


def webdataset_labels(
    shards: str | Path | Sequence[str | Path],
    class_names: ClassNames | None = None,
    *,
    label_ending: str = "cls",
    group_pattern: str | None = None,
    split: Split = "test",
    ordered: bool = False,
) -> LabelledSet:
    """WebDataset tars on disk: of each sample an image and its label, ``KEY.jpg`` and ``KEY.cls``.

    Their headers and labels are read once; images when they are asked for.

    Args:
        shards: a folder of tars, or tars; names may hold braces, as ``test-{00..07}.tar``, or ``*``.
        class_names: label -> name in prompts, or a list of names for 0, 1, 2 …; classes without an image here are
            kept. Labels as they are where it is not given.
        label_ending: of the member that holds the label: a number or text.
        group_pattern: regular expression, searched for in each key; what its first bracket finds is the group.
        split: what the images may be used for.
        ordered: whether the classes are grades, the least first: labels that are numbers, or the order of class_names.

    Raises:
        UserError: a shard that is missing or not whole, a sample without a label or without exactly one image, or a
            label without a name.
    """
    given = [str(shards)] if isinstance(shards, (str, Path)) else [str(shard) for shard in shards]
    tars = _find_tars(given)
    common = os.path.commonpath([tar.parent for tar in tars])
    keys, names, labels, places = [], [], [], []
    for number, tar in enumerate(tars):
        for key, (image, label) in _read_samples(tar, label_ending).items():
            keys.append(key)
            names.append(f"{tar.relative_to(common).as_posix()}/{key}")
            labels.append(label)
            places.append((number, image.offset, image.size))
    of = f"the labels of {tars[0]}" if len(tars) == 1 else f"the labels of {len(tars)} tars in {common}"
    present = sort_labels({*labels, *named_labels(class_names)}, class_names, of, are_grades=ordered)
    class_name_of = bind_names(present, class_names, of, NAMELESS)
    columns = np.array(places, dtype=np.int64).reshape(-1, 3).T
    return LabelledSet(
        images=TarImages(tars, *columns),
        labels=index_labels(labels, class_name_of),
        class_names=list(class_name_of.values()),
        groups=groups_in(keys, group_pattern, common),
        names=names,
        split=split,
        is_ordered=ordered,
        origin={"shards": ", ".join(given), "tars": len(tars), "class_names": class_name_of},
    )


def huggingface_labels(
    folder: str | Path,
    class_names: Mapping[Any, str] | None = None,
    *,
    split: str | None = None,
    used_as: Split | None = None,
    image_column: str = "image",
    label_column: str = "label",
    group_column: str | None = None,
    slide_column: str | None = None,
    ordered: bool = False,
) -> LabelledSet:
    """What ``datasets.save_to_disk`` of Hugging Face has written; images are read when they are asked for.

    Args:
        folder: of a Dataset, or of a DatasetDict, whose splits are told apart by ``split``.
        class_names: label -> name in prompts; a ClassLabel's are known by name, other labels as they are.
        used_as: what the images may be used for; told by the split's name where not given.
        image_column: of the feature Image.
        label_column: ClassLabel (its classes keep their order), whole numbers or text.
        ordered: whether the classes are grades, the least first.

    Raises:
        UserError: the datasets library is not installed, no such data set, split or column, or a row without a label.
    """
    rows = _load_rows(Path(folder), split)
    columns = [column for column in (image_column, label_column, group_column, slide_column) if column is not None]
    missing = [column for column in columns if column not in rows.features]
    if missing:
        raise UserError(f"{folder} has no column {missing[0]!r}; its columns are {', '.join(rows.features)}")
    labels, known = _labels_in(rows, label_column, folder)
    of = f"the values of {label_column} in {folder}"
    present = known or sort_labels({*labels, *named_labels(class_names)}, class_names, of, are_grades=ordered)
    names = bind_names(present, class_names, of, NAMELESS)
    return LabelledSet(
        images=_images_in(rows, image_column, folder),
        labels=index_labels(labels, names),
        class_names=list(names.values()),
        groups=None if group_column is None else _texts_in(rows, group_column, folder),
        slides=None if slide_column is None else _texts_in(rows, slide_column, folder),
        names=[f"{split or rows.split or 'row'}/{index}" for index in range(len(labels))],
        split=split_role(split, used_as),
        is_ordered=ordered,
        origin={"folder": str(folder), "class_names": names, "rows": split or "all"},
    )


def _npz_labels(file: Path) -> dict[str, list[str]]:
    """split -> its labels as text."""
    if not file.is_file():
        raise UserError(f"{file} is not a file; give the npz file of images and labels")
    try:
        # np.load leaves what is no zip open.
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays = {name.removesuffix("_labels"): archive[name] for name in archive.files if name.endswith("_labels")}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"cannot read {file} as an npz file ({error}); get it anew, whole") from error
    for split, labels in arrays.items():
        if labels.dtype.kind not in "iu" or labels.ndim > 2 or labels.size != len(labels):
            raise UserError(
                f"{split}_labels of {file} is {labels.shape} {labels.dtype}; a set has one whole number an image, "
                "(N,) or (N, 1): choose one of several labels, and write the file anew"
            )
    return {split: [str(label) for label in labels.reshape(-1).tolist()] for split, labels in arrays.items()}


def _find_tars(shards: Sequence[str]) -> list[Path]:
    tars: list[Path] = []
    for shard in shards:
        if "://" in shard or shard.startswith("pipe:"):
            raise UserError(f"{shard} is not on this machine; download the shards and give their folder")
        folder = Path(os.path.abspath(shard))
        if folder.is_dir():
            found = sorted(folder.glob("*.tar"))
        else:
            try:
                named = [str(folder)] if folder.is_file() else list(braceexpand.braceexpand(str(folder)))
            except braceexpand.UnbalancedBracesError as error:
                raise UserError(f"{shard} has a brace that is not closed; write as test-{{00..07}}.tar") from error
            found = [Path(path) for name in named for path in (sorted(glob.glob(name)) if "*" in name else [name])]
        if not found:
            raise UserError(f"{shard} names no tar; give a folder of .tar files, or their names")
        tars += found
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(tars)} shards do not exist (first: {missing[0]}); download them all")
    require_once(map(str, tars), "the list of shards")
    return tars


def _read_samples(tar: Path, label_ending: str) -> dict[str, tuple[Member, str]]:
    """key -> (its image, its label), in the order of the tar."""
    members: dict[str, dict[str, Member]] = {}
    for member in read_members(tar):
        folder, _, file = member.name.rpartition("/")
        if file.startswith("."):
            continue  # macOS writes a ._KEY.jpg for each file
        stem, _, ending = file.partition(".")
        sample = members.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if sample.setdefault(ending.lower(), member) is not member:
            raise UserError(f"{tar} has two members {member.name}; each sample has a key of its own")
    samples = {}
    with open(tar, "rb") as file:
        for key, sample in members.items():
            images = [member for ending, member in sample.items() if is_image(f"{key}.{ending}")]
            label = sample.get(label_ending)
            if label is None or len(images) != 1:
                raise UserError(
                    f"sample {key} of {tar} has {', '.join(sample)}; it needs one image and its label in "
                    f".{label_ending} (label_ending names another)"
                )
            file.seek(label.offset)
            try:
                text = file.read(label.size).decode().strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{key}.{label_ending} of {tar} is no text ({error}); a label is one") from error
            if not text:
                raise UserError(f"{key}.{label_ending} of {tar} is empty; write the label into it")
            samples[key] = images[0], text
    return samples


def _load_rows(folder: Path, split: str | None) -> Any:
    """``datasets.Dataset``"""
    try:
        from datasets import Dataset, load_from_disk
    except ModuleNotFoundError as error:
        raise UserError(
            f"{folder} is read by Hugging Face's library, which is missing: pip install datasets"
        ) from error
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # Arrow, json and datasets each have their own for a damaged folder
        raise UserError(
            f"cannot load {folder} ({error}); give a folder that save_to_disk of a Dataset or a DatasetDict has written"
        ) from error
    if isinstance(loaded, Dataset):
        if split is not None and split != str(loaded.split):
            raise UserError(f"{folder} is one data set without splits; leave split={split!r} out, and give used_as")
        return loaded
    if split not in loaded:
        raise UserError(f"split={split!r} is not in {folder}; choose one of {', '.join(loaded)}")
    return loaded[split]


def _labels_in(rows: Any, column: str, folder: str | Path) -> tuple[list[str], list[str] | None]:
    """Labels as text, and the classes in their order where the column knows them."""
    from datasets import ClassLabel

    feature = rows.features[column]
    if not isinstance(feature, ClassLabel):
        return _texts_in(rows, column, folder), None
    numbers = _values_in(rows, column)
    unlabelled = [number for number, value in enumerate(numbers) if value is None or value < 0]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} rows of {folder} have no label (first: row {unlabelled[0]}); test splits of some sets "
            "are published without: choose another split"
        )
    return [feature.names[number] for number in numbers], list(feature.names)


def _texts_in(rows: Any, column: str, folder: str | Path) -> list[str]:
    values = _values_in(rows, column)
    wrong = [number for number, value in enumerate(values) if not isinstance(value, (str, int)) or value == ""]
    if wrong:
        raise UserError(
            f"{len(wrong)} rows of {folder} have no text and no whole number in {column} (first: row {wrong[0]}, "
            f"{values[wrong[0]]!r}); fill them in"
        )
    return [str(value).strip() for value in values]


def _values_in(rows: Any, column: str) -> list[Any]:
    return rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _images_in(rows: Any, column: str, folder: str | Path) -> HuggingFaceImages:
    from datasets import Image

    if not isinstance(rows.features[column], Image):
        raise UserError(f"{column} of {folder} is no column of images; cast_column({column!r}, Image()) makes it one")
    stored = rows.select_columns([column]).with_format(None).cast_column(column, Image(decode=False))
    return HuggingFaceImages(stored, column, folder)
