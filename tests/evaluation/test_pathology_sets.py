from __future__ import annotations

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from quiltnet.errors import UserError
from quiltnet.evaluation.h5_images import H5Images
from quiltnet.evaluation.labelled_set import LabelledSet
from quiltnet.evaluation.pathology_sets import (
    bach,
    crc_val_7k,
    databiox,
    lc25000,
    nct_crc_100k,
    pcam,
    renal_cell,
)
from quiltnet.evaluation.pathology_tables import mhist, osteosarcoma, sicapv2, skin_cancer, skin_tumor
from tests.evaluation import miniatures
from tests.evaluation.miniatures import labels_of, tile

CONF = Path(__file__).parents[2] / "conf" / "evaluator"

# QuiltNet's eval/en_classnames.json, word for word; a set's classes as (label in the set, name in prompts).
CLASSES = {
    pcam: [("0", "lymph node"), ("1", "lymph node containing metastatic tumor tissue")],
    nct_crc_100k: [
        ("ADI", "adipose"), ("DEB", "debris"), ("LYM", "lymphocytes"), ("MUC", "mucus"), ("MUS", "smooth muscle"),
        ("NORM", "normal colon mucosa"), ("STR", "cancer-associated stroma"),
        ("TUM", "colorectal adenocarcinoma epithelium"),
    ],
    bach: [
        ("Benign", "breast non-malignant benign tissue"), ("InSitu", "breast malignant in-situ carcinoma"),
        ("Invasive", "breast malignant invasive carcinoma"), ("Normal", "breast normal breast tissue"),
    ],
    databiox: [
        ("BC_IDC_Grade_1", "well differentiated bloom richardson grade one"),
        ("BC_IDC_Grade_2", "moderately differentiated bloom richardson grade two"),
        ("BC_IDC_Grade_3", "poorly differentiated grade three"),
    ],
    renal_cell: [
        ("blood", "red blood cells"), ("cancer", "renal cancer"), ("normal", "normal renal tissue"),
        ("other", "torn adipose necrotic tissue"), ("stroma", "muscle fibrous stroma blood vessels"),
    ],
    mhist: [("HP", "hyperplastic polyp"), ("SSA", "sessile serrated adenoma")],
    sicapv2: [
        ("NC", "benign glands"), ("G3", "atrophic dense glands"),
        ("G4", "cribriform ill-formed fused papillary patterns"),
        ("G5", "isolated nest cells without lumen roseting patterns"),
    ],
    osteosarcoma: [
        ("Non-Tumor", "non-tumor"), ("Non-Viable-Tumor", "non-viable necrotic osteosarcoma tumor"),
        ("Viable", "viable osteosarcoma tumor"),
    ],
    skin_cancer: [
        ("nontumor_skin_necrosis_necrosis", "necrosis"), ("nontumor_skin_muscle_skeletal", "skeletal muscle"),
        ("nontumor_skin_sweatglands_sweatglands", "eccrine sweat glands"), ("nontumor_skin_vessel_vessel", "vessels"),
        ("nontumor_skin_elastosis_elastosis", "elastosis"),
        ("nontumor_skin_chondraltissue_chondraltissue", "chondral tissue"),
        ("nontumor_skin_hairfollicle_hairfollicle", "hair follicle"),
        ("nontumor_skin_epidermis_epidermis", "epidermis"), ("nontumor_skin_nerves_nerves", "nerves"),
        ("nontumor_skin_subcutis_subcutis", "subcutis"), ("nontumor_skin_dermis_dermis", "dermis"),
        ("nontumor_skin_sebaceousglands_sebaceousglands", "sebaceous glands"),
        ("tumor_skin_epithelial_sqcc", "squamous-cell carcinoma"),
        ("tumor_skin_melanoma_melanoma", "melanoma in-situ"), ("tumor_skin_epithelial_bcc", "basal-cell carcinoma"),
        ("tumor_skin_naevus_naevus", "naevus"),
    ],
}  # fmt: skip
CLASSES[crc_val_7k] = CLASSES[nct_crc_100k]
CLASSES[skin_tumor] = CLASSES[skin_cancer][12:]
LUNG, COLON = partial(lc25000, organ="lung"), partial(lc25000, organ="colon")
CLASSES[LUNG] = [
    ("lung_aca", "lung adenocarcinoma"), ("lung_n", "benign lung"), ("lung_scc", "lung squamous cell carcinoma"),
]  # fmt: skip
CLASSES[COLON] = [("colon_aca", "colon adenocarcinoma"), ("colon_n", "benign colonic tissue")]

# reader -> folder below data_root, what can be missing of its test part, images of a class in it, where to get it
SETS = {
    pcam: ("PatchCamelyon", "camelyonpatch_level_2_split_test_x.h5", 4, "zenodo.org/records/2546921"),
    nct_crc_100k: ("NCT-CRC-HE-100K", "LYM", 4, "zenodo.org/records/1214456"),
    crc_val_7k: ("CRC-VAL-HE-7K", "TUM", 2, "zenodo.org/records/1214456"),
    LUNG: ("lung_colon_image_set", "lung_image_sets/lung_scc", 12, "lung_colon_image_set"),
    COLON: ("lung_colon_image_set", "colon_image_sets/colon_n", 12, "lung_colon_image_set"),
    bach: ("ICIAR2018_BACH_Challenge", "Photos/InSitu", 2, "zenodo.org/records/3632035"),
    databiox: ("Databiox", "BC_IDC_Grade_3/20x", 14, "databiox.com"),
    renal_cell: ("RenalCell", "tissue_classification/other", 2, "zenodo.org/records/7898308"),
    mhist: ("MHIST", "annotations.csv", 2, "bmirds.github.io/MHIST"),
    sicapv2: ("SICAPv2", "partition/Test/Test.xlsx", 1, "data.mendeley.com/datasets/9xxm58dvs3"),
    osteosarcoma: ("Osteosarcoma-UT", "Training-Set-2", 2, "10.7937/tcia.2019.bvhjhdas"),
    skin_cancer: ("SkinCancer", "data/tiles-v2.csv", 2, "10.11588/data/7QCR8S"),
    skin_tumor: ("SkinCancer", "data/tiles", 2, "10.11588/data/7QCR8S"),
}
Reader = Callable[..., LabelledSet]
each_set = pytest.mark.parametrize("reader", SETS, ids=lambda reader: getattr(reader, "__name__", str(reader)[-15:-2]))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return miniatures.make_all(tmp_path_factory.mktemp("published"))


@pytest.fixture
def broken(data_root, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(data_root, tmp_path / "broken"))


@each_set
def test_classes_counts_and_record(reader: Reader, data_root):
    folder, _, per_class, url = SETS[reader]
    dataset = reader(data_root / folder)
    assert list(dataset.origin["class_names"].items()) == CLASSES[reader]
    assert dataset.class_names == [name for _, name in CLASSES[reader]]
    assert dataset.labels.dtype == torch.int64
    assert Counter(labels_of(dataset)) == {label: per_class for label, _ in CLASSES[reader]}
    assert dataset.split == ("train" if reader is nct_crc_100k else "test")
    assert dataset.is_ordered == (reader in (sicapv2, databiox))
    assert len(set(dataset.names)) == len(dataset) == len(dataset.content())
    image, label = dataset[len(dataset) - 1]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), dataset.labels[-1])
    record = dataset.describe()
    json.dumps(record)
    assert url in record["url"]
    assert "en_classnames.json" in record["class_names_of"]
    assert record["root"] == str(data_root / folder)
    unsplit = reader in (LUNG, COLON, bach, databiox, renal_cell, osteosarcoma)
    assert ("none published" in record["split_of"]) == unsplit


@each_set
def test_what_is_missing_is_said_once_and_with_the_address(reader: Reader, broken, tmp_path):
    folder, needed, _, url = SETS[reader]
    path = broken / folder / needed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError) as raised:
        reader(broken / folder)
    message = str(raised.value)
    assert f"there is no {needed}" in message
    assert "Expected below it" in message
    assert url in message
    with pytest.raises(UserError, match="Expected below it"):
        reader(tmp_path / "nowhere")


@pytest.mark.parametrize("reader", [nct_crc_100k, bach, databiox, renal_cell, LUNG])
def test_a_folder_that_was_not_filled_is_missing(reader: Reader, broken):
    folder, needed, _, url = SETS[reader]
    for image in (broken / folder / needed).iterdir():
        image.unlink()
    (broken / folder / needed / "readme.txt").write_text("soon")
    with pytest.raises(UserError, match=f"no image in {needed}/.*{url}"):
        reader(broken / folder)


@pytest.mark.parametrize(
    ("reader", "image"),
    [
        (mhist, "images/MHIST_c08.png"),
        (sicapv2, "images/18B0001159D_Block_Region_1_0_2_xini_6805_yini_59786.jpg"),
        (skin_tumor, "data/tiles/tumor_skin_naevus_naevus/tumor_skin_naevus_naevus_ws_15_6.jpg"),
        (osteosarcoma, "Training-Set-2/set9/P9-B12-14159-22267.jpg"),
    ],
)
def test_an_image_that_the_table_lists_and_is_not_there(reader: Reader, image, broken):
    folder, *_, url = SETS[reader]
    (broken / folder / image).unlink()
    with pytest.raises(UserError, match=f"{Path(image).name}.*{url}"):
        reader(broken / folder)


@pytest.mark.parametrize(
    ("folder", "reader", "split", "known"),
    [
        ("PatchCamelyon", pcam, "valid", "train, val, test"),
        ("CRC-VAL-HE-7K", crc_val_7k, "valid", "train, val, test"),
        ("MHIST", mhist, "val", "train, test"),
        ("SICAPv2", sicapv2, "val", "train, test"),
        ("SICAPv2", partial(sicapv2, fold=1), "test", "train, val"),
        ("SkinCancer", skin_cancer, "Test", "train, val, test"),
    ],
)
def test_unknown_splits(folder, reader: Reader, split, known, data_root):
    with pytest.raises(UserError, match=f"split.*'{split}'.*{known}"):
        reader(data_root / folder, split=split)


# PatchCamelyon


def test_pcam_parts_labels_and_slides(data_root):
    sets = {split: pcam(data_root / "PatchCamelyon", split) for split in ("train", "val", "test")}
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 12, "val": 6, "test": 8}
    assert [dataset.split for dataset in sets.values()] == ["train", "val", "test"]
    assert sets["val"].labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert sets["val"].groups == [f"camelyon16_valid_{slide}" for slide in ("000", "001", "002")] * 2
    assert np.array_equal(np.asarray(sets["val"][4][0]), tile(4, 5))
    assert pcam(data_root / "PatchCamelyon", by_slide=False).groups is None


def test_pcam_is_read_lazily_and_in_other_processes(data_root):
    dataset = pcam(data_root / "PatchCamelyon", "train")
    expected = [np.asarray(image) for image, _ in (dataset[index] for index in range(len(dataset)))]
    copied = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset.images)) < 500
    assert np.array_equal(np.asarray(copied[7][0]), expected[7])
    loader = DataLoader(dataset.images, batch_size=2, num_workers=2)  # forks, with the file open here
    assert np.array_equal(torch.cat(list(loader)).numpy(), np.stack(expected))


def test_a_fork_opens_the_file_for_itself(data_root, monkeypatch):
    images = H5Images(data_root / "PatchCamelyon" / "camelyonpatch_level_2_split_valid_x.h5")
    handle = images._images()
    assert images._images() is handle
    monkeypatch.setattr("quiltnet.evaluation.h5_images.os.getpid", lambda: -1)
    assert images._images() is not handle


def test_h5_images_are_a_sequence(data_root):
    images = H5Images(data_root / "PatchCamelyon" / "camelyonpatch_level_2_split_valid_x.h5")
    assert np.array_equal(images[-1], images[5])
    assert len(list(images)) == 6
    with pytest.raises(IndexError):
        images[6]


def test_pcam_files_that_are_not_whole(broken):
    root = broken / "PatchCamelyon"
    x = root / "camelyonpatch_level_2_split_test_x.h5"
    content = x.read_bytes()
    x.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"test_x\.h5 as HDF5.*zenodo"):
        pcam(root)
    shutil.copy(root / "camelyonpatch_level_2_split_valid_x.h5", x)
    with pytest.raises(UserError, match=r"test_y\.h5 does not hold a label 0 or 1 for each of the 6 images"):
        pcam(root)
    shutil.copy(root / "camelyonpatch_level_2_split_valid_y.h5", root / "camelyonpatch_level_2_split_test_y.h5")
    with pytest.raises(UserError, match=r"test_meta\.csv has 8 rows for 6 images"):
        pcam(root)
    shutil.copy(root / "camelyonpatch_level_2_split_valid_y.h5", x)
    with pytest.raises(UserError, match="no data set 'x'; it has y"):
        pcam(root)


# Folders


def test_nct_crc_with_and_without_background(data_root):
    with_background = nct_crc_100k(data_root / "NCT-CRC-HE-100K", split="test", keep_background=True)
    assert with_background.class_names[:3] == ["adipose", "background", "debris"]
    assert (len(with_background), with_background.split) == (36, "test")
    without = nct_crc_100k(data_root / "NCT-CRC-HE-100K")
    assert without.origin["dropped"] == ["BACK"]
    assert with_background.origin["dropped"] == []
    for dataset in (without, with_background, crc_val_7k(data_root / "CRC-VAL-HE-7K", keep_background=True)):
        assert labels_of(dataset) == [name.split("/")[0] for name in dataset.names]


@pytest.mark.parametrize("reader", [LUNG, COLON, bach, databiox, renal_cell])
def test_labels_are_those_of_the_folders(reader: Reader, data_root):
    dataset = reader(data_root / SETS[reader][0])
    for label, name in zip(labels_of(dataset), dataset.names, strict=True):
        assert label in name.split("/")[:-1]


def test_lc25000_keeps_copies_of_a_tile_on_one_side(data_root):
    root = data_root / "lung_colon_image_set"
    table = root / "lc25000_image_groups.csv"
    train, test = (LUNG(root, split=split, groups_table=table) for split in ("train", "test"))
    assert (train.split, test.split) == ("train", "test")
    assert not set(train.groups) & set(test.groups)
    assert sorted([*train.names, *test.names]) == sorted(LUNG(root).names)
    assert Counter(labels_of(test)) == {"lung_aca": 3, "lung_n": 3, "lung_scc": 3}  # one of four groups of each class
    whole = LUNG(root, groups_table=table)
    assert whole.split == "test"
    assert len(set(whole.groups)) == 12
    group_of = dict(zip(whole.names, whole.groups, strict=True))
    assert group_of["lung_image_sets/lung_scc/lungscc12.jpeg"] == "11"


def test_lc25000_is_not_split_without_groups(data_root, tmp_path):
    root = data_root / "lung_colon_image_set"
    with pytest.raises(UserError, match=r"split=test of LC25000.*groups_table"):
        COLON(root, split="test")
    rows = (root / "lc25000_image_groups.csv").read_text().splitlines(keepends=True)
    (tmp_path / "groups.csv").write_text("".join(row for row in rows if "colonn7," not in row))
    with pytest.raises(UserError, match=r"no group for 1 of 24 images \(first: colonn7\)"):
        COLON(root, groups_table=tmp_path / "groups.csv")
    with pytest.raises(UserError, match=r"'val'.*train, test"):
        COLON(root, split="val", groups_table=root / "lc25000_image_groups.csv")
    with pytest.raises(UserError, match=r"organ.*'liver'.*lung, colon"):
        lc25000(root, organ="liver")


def test_databiox_magnifications_and_specimens(data_root):
    dataset = databiox(data_root / "Databiox", magnifications=["40x", "4x"])
    assert len(dataset) == 3 * 2 * (2 + 1)
    assert {name.split("/")[1] for name in dataset.names} == {"4x", "40x"}
    assert dataset.origin["magnifications"] == ["40x", "4x"]
    assert dataset.groups == dataset.slides
    specimens = ("01_BC_G{}_9057", "02_BC_G{}_10959")
    assert set(dataset.groups) == {specimen.format(grade) for specimen in specimens for grade in (1, 2, 3)}
    with pytest.raises(UserError, match="there is no BC_IDC_Grade_1/400x/"):
        databiox(data_root / "Databiox", magnifications=["400x"])


def test_renal_cell_leaves_empty_out_and_knows_patients(data_root):
    dataset = renal_cell(data_root / "RenalCell")
    assert not any("/empty/" in name for name in dataset.names)
    assert dataset.origin["dropped"] == ["empty"]
    assert set(dataset.groups) == {"TCGA-3Z-A93Z", "FIMM6_14_ML1412133"}


# Configurations

ZEROSHOT = sorted(path.stem for path in CONF.glob("zeroshot_*.yaml"))
PROBES = sorted(path.stem for path in CONF.glob("linear_probe_*.yaml"))
OF_PUBLISHED = [name for name in [*ZEROSHOT, *PROBES] if "pathology_" in (CONF / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("name", OF_PUBLISHED)
def test_the_sets_of_the_evaluator_files_are_read_from_data_root(name, data_root):
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    cfg.data_root = str(data_root)
    parts = {
        key: instantiate(node) for key, node in cfg[name].items() if key in ("dataset", "train", "validation", "test")
    }
    assert {key: dataset.split for key, dataset in parts.items()} == (
        {"dataset": "test"}
        if name in ZEROSHOT
        else {"train": "train", "test": "test"} | ({"validation": "val"} if "validation" in parts else {})
    )
    assert len({tuple(dataset.class_names) for dataset in parts.values()}) == 1


def test_zeroshot_all_is_every_published_set():
    listed = OmegaConf.load(CONF / "zeroshot_all.yaml").defaults
    assert list(listed) == [name for name in OF_PUBLISHED if name in ZEROSHOT]
    assert len(listed) == 13
