"""Those of QuiltNet's zero-shot sets whose labels are published in tables."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from quiltnet.errors import UserError
from quiltnet.evaluation.labelled_set import LabelledSet, Split
from quiltnet.evaluation.published_layout import PublishedLayout, choose

MHIST = {"HP": "hyperplastic polyp", "SSA": "sessile serrated adenoma"}
SICAPV2 = {
    "NC": "benign glands",
    "G3": "atrophic dense glands",
    "G4": "cribriform ill-formed fused papillary patterns",
    "G5": "isolated nest cells without lumen roseting patterns",
}
OSTEOSARCOMA = {
    "Non-Tumor": "non-tumor",
    "Non-Viable-Tumor": "non-viable necrotic osteosarcoma tumor",
    "Viable": "viable osteosarcoma tumor",
}
SKIN_TUMOR = {
    "tumor_skin_epithelial_sqcc": "squamous-cell carcinoma",
    "tumor_skin_melanoma_melanoma": "melanoma in-situ",
    "tumor_skin_epithelial_bcc": "basal-cell carcinoma",
    "tumor_skin_naevus_naevus": "naevus",
}
SKIN_CANCER = {
    "nontumor_skin_necrosis_necrosis": "necrosis",
    "nontumor_skin_muscle_skeletal": "skeletal muscle",
    "nontumor_skin_sweatglands_sweatglands": "eccrine sweat glands",
    "nontumor_skin_vessel_vessel": "vessels",
    "nontumor_skin_elastosis_elastosis": "elastosis",
    "nontumor_skin_chondraltissue_chondraltissue": "chondral tissue",
    "nontumor_skin_hairfollicle_hairfollicle": "hair follicle",
    "nontumor_skin_epidermis_epidermis": "epidermis",
    "nontumor_skin_nerves_nerves": "nerves",
    "nontumor_skin_subcutis_subcutis": "subcutis",
    "nontumor_skin_dermis_dermis": "dermis",
    "nontumor_skin_sebaceousglands_sebaceousglands": "sebaceous glands",
    **SKIN_TUMOR,
}


def mhist(root: str | Path, split: Literal["train", "test"] = "test") -> LabelledSet:
    """MHIST (Wei et al. 2021): colorectal polyps, 224 x 224, 2,175 / 977, the label of most of seven annotators.

    Args:
        root: the folder of ``annotations.csv`` and ``images``.
        split: the official ones.

    Raises:
        UserError: something is missing, or a label is none of the two.
    """
    part = choose("split of MHIST", split, {"train": "train", "test": "test"})
    layout = PublishedLayout("MHIST", Path(root), ["annotations.csv", "images/"], "https://bmirds.github.io/MHIST")
    cells = layout.table("annotations.csv", ["Image Name", "Majority Vote Label", "Partition"])
    rows = [row for row, value in enumerate(cells["Partition"]) if value == part]
    names = [f"images/{cells['Image Name'][row]}" for row in rows]
    labels = [cells["Majority Vote Label"][row] for row in rows]
    return layout.labelled_set(names, labels, MHIST, split=split, split_of="annotations.csv, Partition")


def sicapv2(root: str | Path, split: Split = "test", fold: int | None = None) -> LabelledSet:
    """SICAPv2 (Silva-Rodríguez et al. 2020): 512 x 512 tiles of the prostate by Gleason grade, benign first.

    A tile's label is the first of the greatest of the columns NC, G3, G4 and G5; G4C (cribriform) is ignored. Tiles
    without exactly one of the four set are counted in the record.

    Args:
        root: the folder of ``images``, ``partition`` and ``wsi_labels.xlsx``.
        split: train and test are ``partition/Test/{Train,Test}.xlsx``.
        fold: 1 to 4 for a fold of the cross-validation of the training part, whose train and val are
            ``partition/Validation/Val{fold}/{Train,Test}.xlsx``.

    Raises:
        UserError: something is missing, or a slide has no patient.
    """
    table = _sicapv2_table(split, fold)
    url = "https://data.mendeley.com/datasets/9xxm58dvs3"
    layout = PublishedLayout("SICAPv2", Path(root), ["images/", table, "wsi_labels.xlsx"], url)
    cells = layout.table(table, ["image_name", *SICAPV2])
    marks = np.array([cells[grade] for grade in SICAPV2])  # (4, N)
    patients = layout.table("wsi_labels.xlsx", ["slide_id", "patient_id"])
    patient_of = dict(zip(map(str, patients["slide_id"]), map(str, patients["patient_id"]), strict=True))
    # 16B0001851_Block_Region_1_0_0_xini_6803_yini_59786.jpg
    slides = [str(name).split("_Block_")[0] for name in cells["image_name"]]
    without = sorted(set(slides) - set(patient_of))
    if without:
        raise layout.faulty(f"wsi_labels.xlsx has no patient for slide {without[0]}")
    return layout.labelled_set(
        [f"images/{name}" for name in cells["image_name"]],
        [list(SICAPV2)[grade] for grade in marks.argmax(axis=0)],
        SICAPV2,
        split=split,
        split_of=table,
        groups=[patient_of[slide] for slide in slides],
        is_ordered=True,
        without_single_label=int(((marks != 0).sum(axis=0) != 1).sum()),
    )


def _sicapv2_table(split: Split, fold: int | None) -> str:
    if fold is None:
        part = choose("split of SICAPv2 (no fold)", split, {"train": "Train", "test": "Test"})
        return f"partition/Test/{part}.xlsx"
    if fold not in range(1, 5):
        raise UserError(f"fold={fold} of SICAPv2 must be 1, 2, 3 or 4")
    part = choose("split of a fold of SICAPv2", split, {"train": "Train", "val": "Test"})
    return f"partition/Validation/Val{fold}/{part}.xlsx"


def osteosarcoma(root: str | Path) -> LabelledSet:
    """Osteosarcoma (Leavey et al. 2019, TCIA): 1024 x 1024 tiles of four patients.

    The 53 of 1,144 tiles that are called ``viable: non-viable`` are left out, as in QuiltNet's protocol.

    Args:
        root: the folder of ``ML_Features_1144.csv`` and the folders ``Training-Set-1`` and ``Training-Set-2``.

    Raises:
        UserError: something is missing, or two images have the same name.
    """
    paths = ["ML_Features_1144.csv", "Training-Set-1/", "Training-Set-2/"]
    url = "https://doi.org/10.7937/tcia.2019.bvhjhdas"
    layout = PublishedLayout("Osteosarcoma", Path(root), paths, url)
    cells = layout.table(paths[0], ["image.name", "classification"])
    mixed = "viable: non-viable"
    tiles = [_osteosarcoma_tile(name) for name in cells["image.name"]]
    rows = [row for row, label in enumerate(cells["classification"]) if label != mixed]
    name_of = {}
    for name in layout.images_of({"Training-Set-1": "", "Training-Set-2": ""})[0]:
        # Whole names: a glob of name*, as QuiltNet's reader has it, also finds a tile whose coordinate is longer.
        tile = _osteosarcoma_tile(PurePosixPath(name).stem)
        if name_of.setdefault(tile, name) != name:
            raise layout.faulty(f"{name_of[tile]} and {name} are one tile; remove one of them")
    absent = [f"Training-Set-*/set*/{tiles[row]}.jpg" for row in rows if tiles[row] not in name_of]
    if absent:
        raise layout.missing(absent)
    return layout.labelled_set(
        [name_of[tiles[row]] for row in rows],
        [cells["classification"][row] for row in rows],
        OSTEOSARCOMA,
        split="test",
        # Case-48-P5-C25-41901-28675: Case 3, 4 and 48 and P9 are the four patients.
        groups=[re.match(r"(?:Case-)?[^-]+", tiles[row])[0] for row in rows],
        dropped=[mixed],
    )


def _osteosarcoma_tile(name: str) -> str:
    """The table writes ``Case 48 - P5 C25-41901-28675`` of the file ``Case-48-P5-C25-41901-28675.jpg``."""
    return re.sub(r"[\s-]+", "-", name.strip())


def skin_cancer(
    root: str | Path, split: Split = "test", only_tumor: bool = False, group_column: str | None = "case"
) -> LabelledSet:
    """SkinCancer (Kriegsmann et al. 2022, heiDATA): 395 x 395 tiles of 16 tissues, 88,971 / 12,354 / 28,039.

    Args:
        root: the folder of ``data``, in which ``tiles-v2.csv`` and ``tiles`` lie.
        split: the official ones, column ``set``.
        only_tumor: the four classes whose ``malignicy`` (as the column is spelled) is ``tumor``: SkinTumor.
        group_column: the column with what must not be torn apart, or none. It is said to be ``case``; the other columns
            are as QuiltNet's own reader has them. The table itself was not at hand.

    Raises:
        UserError: something is missing, or a label is none of the 16.
    """
    part = choose("split of SkinCancer", split, {"train": "Train", "val": "Validation", "test": "Test"})
    table = "data/tiles-v2.csv"
    url = "https://heidata.uni-heidelberg.de/dataset.xhtml?persistentId=doi:10.11588/data/7QCR8S"
    name = "SkinTumor" if only_tumor else "SkinCancer"
    layout = PublishedLayout(name, Path(root), [table, "data/tiles/"], url)
    columns = ["file", "class", "set", *(["malignicy"] if only_tumor else []), *filter(None, [group_column])]
    cells = layout.table(table, columns)
    rows = [row for row, value in enumerate(cells["set"]) if value == part]
    if only_tumor:
        rows = [row for row in rows if cells["malignicy"][row] == "tumor"]
    return layout.labelled_set(
        [cells["file"][row] for row in rows],  # data/tiles/…
        [cells["class"][row] for row in rows],
        SKIN_TUMOR if only_tumor else SKIN_CANCER,
        split=split,
        split_of=f"{table}, set",
        groups=None if group_column is None else [cells[group_column][row] for row in rows],
        groups_of=group_column,
    )


def skin_tumor(root: str | Path, split: Split = "test", group_column: str | None = "case") -> LabelledSet:
    """SkinTumor: the four tumours of ``skin_cancer``, 29,419 / 4,146 / 8,851."""
    return skin_cancer(root, split, only_tumor=True, group_column=group_column)
