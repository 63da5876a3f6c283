from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from quiltnet.errors import UserError
from quiltnet.evaluation.features import SetEncoder
from quiltnet.evaluation.pair_tables import FilePairs, arch_pairs, table_pairs
from quiltnet.evaluation.retrieval import Retrieval
from tests.evaluation.toy import ToyModel, noise_tile

ROWS = {
    "image_path": ["a.png", "sub/b.png", "./a.png", "a.png"],
    "caption": ["glands, dilated", "fat", "with mucin", "glands, dilated"],
    "ids": ["7", "08", "7", "7"],
}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "sub/b.png"]):
        Image.fromarray(noise_tile(seed)).save(folder / name)
    return folder


def write_table(path, rows=ROWS):
    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_rows_of_an_image_become_one(tmp_path, images, ending):
    pairs = table_pairs(write_table(tmp_path / f"pairs.{ending}"), images)
    assert len(pairs) == 2
    assert pairs.image_ids == ["a.png", "sub/b.png"]
    assert pairs.captions == [["glands, dilated", "with mucin"], ["fat"]]
    assert pairs.split == "test"
    image, captions, image_id = pairs[1]
    assert (image.mode, captions, image_id) == ("RGB", ["fat"], "sub/b.png")
    assert np.array_equal(np.asarray(image), noise_tile(1))


def test_ids_and_split_of_a_table(tmp_path, images):
    rows = {**ROWS, "image_path": ["a.png", "sub/b.png", "a.png", "a.png"]}
    pairs = table_pairs(write_table(tmp_path / "pairs.csv", rows), images, id_column="ids", split="val")
    assert pairs.image_ids == ["7", "08"]
    assert pairs.split == "val"


def test_describe_is_the_same_wherever_the_set_lies(tmp_path, images):
    found = [table_pairs(write_table(tmp_path / f"{name}.csv"), images).describe() for name in ("one", "two")]
    assert json.loads(json.dumps(found[0])) == found[0]
    assert (found[0]["rows"], found[0]["images"]) == (4, 2)
    assert found[0]["sha256"] == found[1]["sha256"]
    other = table_pairs(write_table(tmp_path / "b.csv", {**ROWS, "caption": ["a", "b", "c", "d"]}), images)
    assert other.describe()["sha256"] != found[0]["sha256"]


def test_content_differs_where_the_pairs_do(tmp_path, images):
    content = table_pairs(write_table(tmp_path / "pairs.csv"), images).content()
    assert len(set(content)) == 2
    other = table_pairs(write_table(tmp_path / "b.csv", {**ROWS, "caption": ["a", "fat", "c", "d"]}), images).content()
    assert other[0] != content[0]
    assert other[1] == content[1]
    Image.fromarray(noise_tile(9, size=11)).save(images / "sub/b.png")
    assert table_pairs(tmp_path / "pairs.csv", images).content()[1] != content[1]


def test_a_missing_file_is_said_at_the_door(tmp_path, images):
    table = write_table(tmp_path / "pairs.csv", {"image_path": ["a.png", "c.png", "d.png"], "caption": ["x", "y", "z"]})
    with pytest.raises(UserError, match=r"2 of 3 images .* do not exist .*c\.png.*; give"):
        table_pairs(table, images)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"caption_column": "text"}, "no column 'text'"),
        ({**ROWS, "caption": ["x", " ", "y", ""]}, {}, r"2 rows of .* have no caption \(first: row 2\)"),
        ({"image_path": [], "caption": []}, {}, "no row"),
        ({**ROWS, "ids": ["1", "1", "2", "2"]}, {"id_column": "ids"}, "id '1' is given to .*a.png and to .*b.png"),
        (ROWS, {"split": "holdout"}, "split='holdout'"),
    ],
)
def test_tables_that_are_refused(tmp_path, images, rows, options, message):
    with pytest.raises(UserError, match=message):
        table_pairs(write_table(tmp_path / "pairs.csv", rows), images, **options)


def test_an_image_that_cannot_be_read(tmp_path, images):
    pairs = table_pairs(write_table(tmp_path / "pairs.csv"), images)
    (images / "a.png").write_bytes((images / "a.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"cannot read .*a\.png"):
        pairs[0]
    Image.fromarray(np.full((4, 4), 40000, dtype=np.int32)).save(images / "sub/b.png", format="TIFF")
    with pytest.raises(UserError, match=r"cannot read .*b\.png"):
        pairs[1]


def test_retrieval_on_a_table(tmp_path, images):
    evaluator = Retrieval(table_pairs(write_table(tmp_path / "pairs.csv"), images), ks=[1])
    assert evaluator.split == "test"
    assert evaluator.describe()["rows"] == 4
    outcome = evaluator.run(SetEncoder(ToyModel()))
    assert outcome.details["gallery"] == {"images": 2, "captions": 3}


@pytest.fixture
def arch(tmp_path):
    """ARCH in small, as its two archives unpack: two images of one figure, and a caption without an image."""
    books = [("00", "A", "Glands.", "u0"), ("00", "B", "Glands.", "u1"), ("01", "Single", "Fat.", "u2")]
    books = [dict(zip(("figure_id", "letter", "caption", "uuid"), entry, strict=True)) for entry in books]
    books.append({"figure_id": "02", "letter": "A", "caption": "Lost.", "uuid": "u9"})
    pubmed = [{"caption": "Stroma.", "uuid": "u0"}, {"caption": "Fat.", "uuid": "p1"}]
    for part, entries, ending in (("books", books, "png"), ("pubmed", pubmed, "jpg")):
        (tmp_path / f"{part}_set/images").mkdir(parents=True)
        numbered = {str(number): entry for number, entry in enumerate(entries)}
        (tmp_path / f"{part}_set/captions.json").write_text(json.dumps(numbered))
        for number, entry in numbered.items():
            if entry["uuid"] != "u9":
                path = tmp_path / f"{part}_set/images/{entry['uuid']}.{ending}"
                Image.fromarray(noise_tile(int(number))).save(path)
    (tmp_path / "books_set/images/._u9.png").touch()  # what macOS leaves beside files
    return tmp_path


def test_arch(arch):
    pairs = arch_pairs(arch, max_missing_fraction=0.2)
    assert pairs.image_ids == ["books/u0", "books/u1", "books/u2", "pubmed/u0", "pubmed/p1"]
    assert pairs.captions == [["Glands."], ["Glands."], ["Fat."], ["Stroma."], ["Fat."]]
    assert pairs[3][0].mode == "RGB"
    found = pairs.describe()
    assert (found["parts"], found["captions"], found["captions_without_image"]) == (["books", "pubmed"], 6, 1)
    outcome = Retrieval(pairs, ks=[1]).run(SetEncoder(ToyModel()))
    assert outcome.details["gallery"] == {"images": 5, "captions": 3}
    assert outcome.details["right_answers"]["text_to_image"]["most"] == 2  # both images of the figure


def test_a_part_of_arch(arch):
    assert arch_pairs(arch, "pubmed").image_ids == ["pubmed/u0", "pubmed/p1"]
    assert arch_pairs(arch, ["pubmed"]).describe()["captions_without_image"] == 0


def test_arch_that_is_refused(arch):
    with pytest.raises(UserError, match=r"1 of 4 captions .* have no image \(first: books/u9\)"):
        arch_pairs(arch, ["books"])
    with pytest.raises(UserError, match="give one or both of books, pubmed"):
        arch_pairs(arch, ["book"])
    (arch / "pubmed_set/captions.json").unlink()
    with pytest.raises(UserError, match=r"unpack pubmed_set\.zip"):
        arch_pairs(arch, ["pubmed"])


def test_quilt_like_table(shared_data):
    folder = shared_data / "quilt_like"
    pairs = table_pairs(folder / "quilt_1M_lookup.csv", folder / "images")
    rows = pd.read_csv(folder / "quilt_1M_lookup.csv")
    assert isinstance(pairs, FilePairs)
    assert len(pairs) == rows.image_path.nunique()
    assert sum(map(len, pairs.captions)) == len(rows[["image_path", "caption"]].drop_duplicates())
    assert pairs[0][0].mode == "RGB"
