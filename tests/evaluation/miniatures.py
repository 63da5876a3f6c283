"""Miniatures of public labelled sets: folders, file names, columns and oddities as published, 8 x 8 pixels an image.

Each function makes one in a folder, the root that its reader takes. Tiles are redder the later their class comes, so
that something can be learned from them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.pathology_sets import BACH, DATABIOX, LC25000, NCT_CRC, RENAL_CELL
from quiltnet.evaluation.pathology_tables import SKIN_CANCER

SICAPV2_COLUMNS = ["image_name", "NC", "G3", "G4", "G5", "G4C"]


def tile(number: int, label: int) -> np.ndarray:
    """(8, 8, 3) uint8: noise, redder with the label."""
    noise = np.random.default_rng(number).integers(0, 200, (8, 8, 3))
    noise[..., 0] = (noise[..., 0] // 8 + 15 * label) % 256
    return noise.astype(np.uint8)


def save_tile(path: Path, number: int, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile(number, label)).save(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_xlsx(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_excel(path, index=False)


def labels_of(dataset: LabelledSet) -> list[str]:
    """Every image's label as the set spells it, by way of its class name."""
    label_of = {name: label for label, name in dataset.origin["class_names"].items()}
    return [label_of[dataset.class_names[index]] for index in dataset.labels.tolist()]


def make_pcam(root: Path) -> Path:
    """y is (N, 1, 1, 1); the validation part is called ``valid``; three slides a part."""
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    for part, count in {"train": 12, "valid": 6, "test": 8}.items():
        stem = root / f"camelyonpatch_level_2_split_{part}"
        labels = [(index + 1) % 2 for index in range(count)]
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack([tile(index, 5 * label) for index, label in enumerate(labels)])
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.array(labels, dtype=np.uint8).reshape(-1, 1, 1, 1)
        write_csv(
            Path(f"{stem}_meta.csv"),
            [
                {
                    "": index,
                    "coord_y": 96 * index,
                    "coord_x": 96,
                    "tumor_patch": bool(label),
                    "center_tumor_patch": bool(label),
                    "wsi": f"camelyon16_{part}_{index % 3:03}",
                }
                for index, label in enumerate(labels)
            ],
        )
    return root


def make_nct_crc(root: Path) -> Path:
    """``NCT-CRC-HE-100K`` (four tiles a folder) and ``CRC-VAL-HE-7K`` (two), BACK among the nine folders."""
    for label, folder in enumerate(sorted([*NCT_CRC, "BACK"])):
        for number in range(4):
            save_tile(root / "NCT-CRC-HE-100K" / folder / f"{folder}-AAAM{number}.tif", number, label)
        for number in range(2):
            save_tile(root / "CRC-VAL-HE-7K" / folder / f"{folder}-TCGA-AAIC{number}.tif", 10 + number, label)
    return root


def make_lc25000(root: Path) -> Path:
    """The names of a class's files are not those of its folder; four groups of three tiles a class."""
    stem_of = {
        "lung_aca": "lungaca",
        "lung_n": "lungn",
        "lung_scc": "lungscc",
        "colon_aca": "colonca",
        "colon_n": "colonn",
    }
    rows = []
    for organ, class_names in LC25000.items():
        for label, folder in enumerate(class_names):
            for number in range(12):
                stem = f"{stem_of[folder]}{number + 1}"
                save_tile(root / f"{organ}_image_sets" / folder / f"{stem}.jpeg", number, 3 * label)
                local, offset = number // 3, 4 * list(stem_of).index(folder)
                rows.append(
                    {
                        "stem": stem,
                        "filename": f"{stem}.jpeg",
                        "label": folder,
                        "tissue": organ,
                        "local_cluster_label": local,
                        "group_id": offset + local,
                    }
                )
    write_csv(root / "lc25000_image_groups.csv", rows)
    return root


def make_bach(root: Path) -> Path:
    """Photographs are .tif; the folder also holds a table without a header, and Windows' thumbnails."""
    prefix = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}
    lines = []
    for label, folder in enumerate(BACH):
        for number in range(2):
            name = f"{prefix[folder]}{number + 1:03}.tif"
            save_tile(root / "Photos" / folder / name, number, 3 * label)
            lines.append(f"{name},{folder}\n")
        (root / "Photos" / folder / "Thumbs.db").write_bytes(b"no image")
    (root / "Photos" / "microscopy_ground_truth.csv").write_text("".join(lines))
    return root


def make_databiox(root: Path) -> Path:
    """Two specimens a grade; suffixes in capitals, but those of 4x."""
    for label, folder in enumerate(DATABIOX):
        for specimen in ("01_BC_G{}_9057", "02_BC_G{}_10959"):
            stem = specimen.format(label + 1)
            save_tile(root / folder / "4x" / f"{stem}_4x_1.jpg", 0, 5 * label)
            for magnification in ("10x", "20x", "40x"):
                for number in (1, 2):
                    path = root / folder / magnification / f"{stem}_{magnification}_{number}.JPG"
                    save_tile(path, number, 5 * label)
    return root


def make_renal_cell(root: Path) -> Path:
    """Six folders, ``empty`` among them; tiles of a TCGA and of a Helsinki slide, with a space in their names."""
    tissue_of = {"blood": "Blood", "cancer": "Cancer", "normal": "Normal", "other": "Other", "stroma": "Stroma"}
    for label, (folder, tissue) in enumerate([*((name, tissue_of[name]) for name in RENAL_CELL), ("empty", "Empty")]):
        for number, stem in enumerate(
            [f"FIMM6_14_ML1412133.mrxs_{tissue}Tile 1", f"TCGA-3Z-A93Z-01Z-00-DX1_{tissue}Tile 1"]
        ):
            save_tile(root / "tissue_classification" / folder / f"{stem}.png", number, 3 * label)
    return root


def make_mhist(root: Path) -> Path:
    """SSA comes first in the table, HP first in the alphabet."""
    rows = []
    for number in range(12):
        label = ("SSA", "HP")[number % 2]
        rows.append(
            {
                "Image Name": f"MHIST_{'abc'[number % 3]}{number:02}.png",
                "Majority Vote Label": label,
                "Number of Annotators who Selected SSA (Out of 7)": 6 if label == "SSA" else 2,
                "Partition": "train" if number < 8 else "test",
            }
        )
        save_tile(root / "images" / rows[-1]["Image Name"], number, 5 * (number % 2))
    write_csv(root / "annotations.csv", rows)
    return root


def make_sicapv2(root: Path) -> Path:
    """G4C beside one-hot columns: a cribriform tile is G4 and G4C. Two slides of patient 1, one each of 2 and 3."""
    patient_of = {"16B0001851": 1, "16B0003388": 1, "17B0010229": 2, "18B0001159D": 3}
    rows: dict[str, list[dict[str, object]]] = {slide: [] for slide in patient_of}
    for slide in patient_of:
        for number, grade in enumerate(["G4", "NC", "G5", "G3"]):
            name = f"{slide}_Block_Region_1_0_{number}_xini_{6803 + number}_yini_59786.jpg"
            marks = {column: int(column == grade) for column in SICAPV2_COLUMNS[1:]}
            rows[slide].append({"image_name": name, **marks, "G4C": int(grade == "G4")})
            save_tile(root / "images" / name, number, 4 * ["NC", "G3", "G4", "G5"].index(grade))
            save_tile(root / "masks" / name, number, 0)
    first, second, third, last = rows.values()
    write_xlsx(root / "partition" / "Test" / "Train.xlsx", [*first, *second, *third])
    write_xlsx(root / "partition" / "Test" / "Test.xlsx", last)
    write_xlsx(root / "partition" / "Validation" / "Val1" / "Train.xlsx", [*first, *second])
    write_xlsx(root / "partition" / "Validation" / "Val1" / "Test.xlsx", third)
    slides = [{"slide_id": slide, "patient_id": patient} for slide, patient in patient_of.items()]
    write_xlsx(root / "wsi_labels.xlsx", slides)
    return root


def make_osteosarcoma(root: Path) -> Path:
    """The table's names have spaces, and for case 48 a dash between spaces, where the files' have dashes."""
    table = [
        ("Case 3 A10-10547-25283", "Non-Tumor", "Training-Set-1/set1"),
        ("Case 3 A10-10547-2528", "Viable", "Training-Set-1/set1"),  # the beginning of another's name
        ("Case 4 C21-39089-14210", "Non-Viable-Tumor", "Training-Set-1/set2"),
        ("Case 48 - P5 C13-24121-14200", "Viable", "Training-Set-2/set8"),
        ("Case 48 - P5 C16-53844-23083", "viable: non-viable", "Training-Set-2/set8"),
        ("P9 B11-10159-22267", "Non-Tumor", "Training-Set-2/set9"),
        ("P9 B12-14159-22267", "Non-Viable-Tumor", "Training-Set-2/set9"),
    ]
    for number, (name, label, folder) in enumerate(table):
        file = name.replace(" - ", "-").replace(" ", "-")
        save_tile(root / folder / f"{file}.jpg", number, 5 * (label == "Viable"))
    write_csv(
        root / "ML_Features_1144.csv",
        [{"image.name": name, "red.count": 3, "classification": label} for name, label, _ in table],
    )
    return root


def make_skin(root: Path) -> Path:
    """``malignicy`` is how the column is spelled; paths start above the table's folder; the split comes last."""
    rows = []
    for label, name in enumerate(SKIN_CANCER):
        for number, part in enumerate([*["Train"] * 4, *["Validation"] * 2, *["Test"] * 2]):
            file = f"data/tiles/{name}/{name}_ws_{label}_{number}.jpg"
            save_tile(root / file, number, label)
            rows.append(
                {
                    "file": file,
                    "class": name,
                    "malignicy": name.split("_")[0],
                    "case": f"{part.lower()}-{number % 2}",  # of several classes, in one part
                    "set": part,
                }
            )
    write_csv(root / "data" / "tiles-v2.csv", rows)
    return root


def make_all(data_root: Path) -> Path:
    """Every set at the place below ``data_root`` where conf/evaluator looks for it."""
    make_pcam(data_root / "PatchCamelyon")
    make_nct_crc(data_root)
    make_lc25000(data_root / "lung_colon_image_set")
    make_bach(data_root / "ICIAR2018_BACH_Challenge")
    make_databiox(data_root / "Databiox")
    make_renal_cell(data_root / "RenalCell")
    make_mhist(data_root / "MHIST")
    make_sicapv2(data_root / "SICAPv2")
    make_osteosarcoma(data_root / "Osteosarcoma-UT")
    make_skin(data_root / "SkinCancer")
    return data_root
