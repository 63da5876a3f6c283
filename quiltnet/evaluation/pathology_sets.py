"""The labelled sets of QuiltNet's zero-shot evaluation, read as they are published.

Class names are those of QuiltNet's ``eval/en_classnames.json``, bound to the labels that the sets themselves use. Where
a set has no official split, all of it is a test set, and its record says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import torch

from quiltnet.errors import UserError
from quiltnet.evaluation.group_split import part_by_group
from quiltnet.evaluation.h5_images import H5Images, open_h5
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.published_layout import CLASS_NAMES_OF, NO_SPLIT, PublishedLayout, choose

LC25000_PARTS: dict[Split, float] = {"train": 0.8, "test": 0.2}

PCAM = {"0": "lymph node", "1": "lymph node containing metastatic tumor tissue"}
NCT_CRC = {
    "ADI": "adipose",
    "DEB": "debris",
    "LYM": "lymphocytes",
    "MUC": "mucus",
    "MUS": "smooth muscle",
    "NORM": "normal colon mucosa",
    "STR": "cancer-associated stroma",
    "TUM": "colorectal adenocarcinoma epithelium",
}
LC25000 = {
    "lung": {
        "lung_aca": "lung adenocarcinoma",
        "lung_n": "benign lung",
        "lung_scc": "lung squamous cell carcinoma",
    },
    "colon": {"colon_aca": "colon adenocarcinoma", "colon_n": "benign colonic tissue"},
}
BACH = {
    "Benign": "breast non-malignant benign tissue",
    "InSitu": "breast malignant in-situ carcinoma",
    "Invasive": "breast malignant invasive carcinoma",
    "Normal": "breast normal breast tissue",
}
DATABIOX = {
    "BC_IDC_Grade_1": "well differentiated bloom richardson grade one",
    "BC_IDC_Grade_2": "moderately differentiated bloom richardson grade two",
    "BC_IDC_Grade_3": "poorly differentiated grade three",
}
RENAL_CELL = {
    "blood": "red blood cells",
    "cancer": "renal cancer",
    "normal": "normal renal tissue",
    "other": "torn adipose necrotic tissue",
    "stroma": "muscle fibrous stroma blood vessels",
}


def pcam(root: str | Path, split: Split = "test", by_slide: bool = True) -> LabelledSet:
    """PatchCamelyon (Veeling et al. 2018): 96 x 96 tiles of lymph nodes, 262,144 / 32,768 / 32,768.

    Args:
        root: the folder with the unpacked ``camelyonpatch_level_2_split_*`` files.
        split: the official ones; ``val`` is the files' ``valid``.
        by_slide: take the slide of each tile from the ``_meta.csv`` file, as what must not be torn apart.

    Raises:
        UserError: a file is missing, cut short, or does not have one label for each image.
    """
    part = choose("split of PatchCamelyon", split, {"train": "train", "val": "valid", "test": "test"})
    stem = f"camelyonpatch_level_2_split_{part}"
    paths = [f"{stem}_x.h5", f"{stem}_y.h5", *([f"{stem}_meta.csv"] if by_slide else [])]
    layout = PublishedLayout(
        "PatchCamelyon", Path(root), paths, "https://zenodo.org/records/2546921 (each .h5 is a .gz there)"
    )
    try:
        images = H5Images(layout.root / paths[0])
        labels = torch.from_numpy(open_h5(layout.root / paths[1], "y")[:].reshape(-1)).long()  # (N, 1, 1, 1) there
    except UserError as error:
        raise layout.faulty(error) from error
    if len(labels) != len(images) or not set(labels.unique().tolist()) <= {0, 1}:
        raise layout.faulty(f"{paths[1]} does not hold a label 0 or 1 for each of the {len(images)} images")
    groups = None
    if by_slide:
        # Column as read by public code (the file itself was not at hand).
        groups = layout.table(paths[2], ["wsi"])["wsi"]
        if len(groups) != len(images):
            raise layout.faulty(f"{paths[2]} has {len(groups)} rows for {len(images)} images")
    return LabelledSet(
        images,
        labels,
        list(PCAM.values()),
        groups=groups,
        names=[f"{part}/{index}" for index in range(len(images))],
        split=split,
        origin=layout.origin(PCAM, split_of=paths[0]),
    )


def nct_crc_100k(root: str | Path, split: Split = "train", keep_background: bool = False) -> LabelledSet:
    """NCT-CRC-HE-100K (Kather et al. 2018): 100,000 tiles of colorectal tissue, 224 x 224, nine folders.

    Args:
        root: the folder of the nine folders.
        split: its official role is ``train``; ``test`` where nothing is trained on it, as in zero-shot classification.
        keep_background: keep BACK, which QuiltNet's protocol leaves out and has no name for; here ``background``.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    return _nct_crc("NCT-CRC-HE-100K", root, split, keep_background)


def crc_val_7k(root: str | Path, split: Split = "test", keep_background: bool = False) -> LabelledSet:
    """CRC-VAL-HE-7K (Kather et al. 2018): 7,180 tiles of 50 other patients than NCT-CRC-HE-100K, in the same folders.

    Args:
        root, keep_background: as for ``nct_crc_100k``.
        split: its role beside NCT-CRC-HE-100K is ``test``.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    return _nct_crc("CRC-VAL-HE-7K", root, split, keep_background)


def _nct_crc(name: str, root: str | Path, split: Split, keep_background: bool) -> LabelledSet:
    class_names = dict(sorted({**NCT_CRC, **({"BACK": "background"} if keep_background else {})}.items()))
    layout = PublishedLayout(
        name, Path(root), [f"{label}/" for label in class_names], "https://zenodo.org/records/1214456"
    )
    names, labels = layout.images_of({label: label for label in class_names})
    record = {"dropped": ["BACK"]}
    if keep_background:
        record = {"dropped": [], "class_names_of": f"{CLASS_NAMES_OF}; background is our own"}
    return layout.labelled_set(names, labels, class_names, split=split, split_of="the set itself", **record)


def lc25000(
    root: str | Path,
    organ: Literal["lung", "colon"],
    split: Literal["train", "test"] | None = None,
    groups_table: str | Path | None = None,
) -> LabelledSet:
    """LC25000 (Borkowski et al. 2019): 15,000 tiles of the lung or 10,000 of the colon.

    The tiles are turned and mirrored copies of about 250 original ones a class, and no split is published. One at
    random has copies of the same original on both sides; with a table of groups whole originals go to one side.

    Args:
        root: the unpacked ``lung_colon_image_set``.
        split: none for all tiles, to test on. The parts (``group_split``) are the same on every machine, and need the
            groups.
        groups_table: csv with the columns ``stem`` (of the image's file name) and ``group_id``, such as
            ``lc25000_image_groups.csv`` of github.com/GeorgeBatch/LC25000-clean.

    Raises:
        UserError: a folder is missing or holds no image, an image has no group, or a split is asked for without groups.
    """
    class_names = choose("organ of LC25000", organ, LC25000)
    if split is not None and groups_table is None:
        raise UserError(
            f"split={split} of LC25000 would tear copies of one tile apart: none is published; give groups_table "
            "(lc25000_image_groups.csv of github.com/GeorgeBatch/LC25000-clean), or no split to test on all of it"
        )
    folders = {f"{organ}_image_sets/{label}": label for label in class_names}
    url = "https://github.com/tampapath/lung_colon_image_set"
    layout = PublishedLayout(f"LC25000 {organ}", Path(root), [f"{folder}/" for folder in folders], url)
    names, labels = layout.images_of(folders)
    groups = None if groups_table is None else _lc25000_groups(Path(groups_table), names)
    dataset = layout.labelled_set(
        names,
        labels,
        class_names,
        split=split or "test",
        split_of=NO_SPLIT if split is None else "none published: parted by group",
        groups=groups,
        groups_of=None if groups_table is None else str(groups_table),
    )
    return dataset if split is None else part_by_group(dataset, split, LC25000_PARTS)


def _lc25000_groups(table: Path, names: Sequence[str]) -> list[str]:
    url = "https://github.com/GeorgeBatch/LC25000-clean"
    layout = PublishedLayout("the table of LC25000's groups", table.parent, [table.name], url)
    cells = layout.table(table.name, ["stem", "group_id"])
    group_of = dict(zip(cells["stem"], cells["group_id"], strict=True))
    stems = [PurePosixPath(name).stem for name in names]
    without = [stem for stem in stems if stem not in group_of]
    if without:
        raise layout.faulty(f"it has no group for {len(without)} of {len(stems)} images (first: {without[0]})")
    return [group_of[stem] for stem in stems]


def bach(root: str | Path) -> LabelledSet:
    """BACH, part A (Aresta et al. 2019): 400 photographs of breast tissue, 2048 x 1536.

    Args:
        root: the unpacked ``ICIAR2018_BACH_Challenge``. The challenge's own test labels are not published.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    folders = {f"Photos/{label}": label for label in BACH}
    layout = PublishedLayout(
        "BACH", Path(root), [f"{folder}/" for folder in folders], "https://zenodo.org/records/3632035"
    )
    names, labels = layout.images_of(folders)
    return layout.labelled_set(names, labels, BACH, split="test")


def databiox(root: str | Path, magnifications: Sequence[str] = ("4x", "10x", "20x", "40x")) -> LabelledSet:
    """Databiox (Bolhasani et al. 2020): invasive ductal carcinoma of the breast in three grades.

    Args:
        root: the folder of ``BC_IDC_Grade_{1,2,3}``.
        magnifications: folders below the grades'. All of them is what a reader of whole class folders, as QuiltNet's
            evaluation uses, sees.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    folders = {f"{grade}/{magnification}": grade for grade in DATABIOX for magnification in magnifications}
    url = "https://databiox.com/datasets"
    layout = PublishedLayout("Databiox", Path(root), [f"{folder}/" for folder in folders], url)
    names, labels = layout.images_of(folders)
    # 01_BC_G1_9057_40x_2.JPG: everything before the magnification is the specimen, which has one grade.
    specimens = [re.sub(r"_\d+x_\d+$", "", PurePosixPath(name).stem, flags=re.IGNORECASE) for name in names]
    return layout.labelled_set(
        names,
        labels,
        DATABIOX,
        split="test",
        groups=specimens,
        slides=specimens,
        is_ordered=True,
        magnifications=list(magnifications),
    )


def renal_cell(root: str | Path) -> LabelledSet:
    """RenalCell (Brummer et al. 2023): 300 x 300 tiles of clear cell renal cell carcinoma, TCGA's and Helsinki's.

    The sixth folder, ``empty``, has no name in QuiltNet's protocol and is left out.

    Args:
        root: the folder that ``tissue_classification.zip`` was unpacked to.

    Raises:
        UserError: a folder is missing or holds no image.
    """
    folders = {f"tissue_classification/{label}": label for label in RENAL_CELL}
    url = "https://zenodo.org/records/7898308"
    layout = PublishedLayout("RenalCell", Path(root), [f"{folder}/" for folder in folders], url)
    names, labels = layout.images_of(folders)
    groups = [_renal_cell_patient(PurePosixPath(name).stem) for name in names]
    return layout.labelled_set(names, labels, RENAL_CELL, split="test", groups=groups, dropped=["empty"])


def _renal_cell_patient(stem: str) -> str:
    """TCGA-XX-YYYY of a TCGA barcode; the slide ``FIMM6_14_ML1412133`` of one of Helsinki's, which names no patient."""
    barcode = re.match(r"TCGA-[^-_]+-[^-_]+", stem)
    # Tile names as read by public code; of TCGA's, only the barcode before the first underscore was seen.
    return barcode[0] if barcode else re.split(r"\.mrxs|_[A-Za-z]*Tile", stem)[0]
