"""``quiltnet embed`` writes the features that the model gives, of every image, or nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import quiltnet
from quiltnet.cli import shard_progress
from quiltnet.cli.embed import embed
from quiltnet.cli.embed_sources import find_embed_images
from quiltnet.data.held_out import ShardPairs
from quiltnet.errors import UserError
from quiltnet.model.contrastive import ContrastiveModel
from quiltnet.release.exporting import export_open_clip
from quiltnet.release.hub import load_model
from tests.commands import environment
from tests.model.towers import tiny_model

NAMES = ["a/b/deep.png", "a/first.JPG", "z.png"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("model") / "tiny"
    export_open_clip(tiny_model(), out)
    return str(out)


@pytest.fixture
def pictures(tmp_path):
    """Three images at several depths, and files that are none."""
    random = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (tmp_path / "pictures" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "pictures" / "._z.png").write_bytes(b"what some systems leave")
    return tmp_path / "pictures"


def read(file):
    with safe_open(file, framework="pt") as opened:
        assert list(opened.keys()) == ["features"]
        return opened.get_tensor("features"), opened.metadata()


def encoded(model: ContrastiveModel, images, **options) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.encode_image(model.transform(image)[None], **options) for image in images])


def test_features_of_a_folder(tmp_path, tiny_folder, pictures):
    out = tmp_path / "made" / "features.safetensors"
    embed(tiny_folder, str(pictures), out, batch_size=2)
    features, metadata = read(out)
    assert json.loads(metadata["ids"]) == NAMES
    model = load_model(tiny_folder).eval()
    images = [Image.open(pictures / name).convert("RGB") for name in NAMES]
    torch.testing.assert_close(features, encoded(model, images))
    assert (metadata["model"], metadata["data"], metadata["projected"]) == (tiny_folder, str(pictures), "true")
    assert metadata["weights_sha256"] == model.weights_sha256()
    assert json.loads(metadata["preprocess_cfg"]) == model.describe()["preprocess_cfg"]
    assert metadata["quiltnet"] == quiltnet.__version__
    assert [file.name for file in out.parent.iterdir()] == [out.name], "nothing else is left there"


def test_a_log_is_told_how_far_it_is(tmp_path, tiny_folder, pictures, monkeypatch, capsys):
    monkeypatch.setattr(shard_progress, "LINE_EVERY_S", 0)
    embed(tiny_folder, str(pictures), tmp_path / "features.safetensors", batch_size=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["encoding: 2 of 3", "encoding: 3 of 3"]


def test_features_before_the_projection(tmp_path, tiny_folder, pictures):
    out = tmp_path / "features.safetensors"
    embed(tiny_folder, str(pictures), out, before_projection=True)
    features, metadata = read(out)
    model = load_model(tiny_folder).eval()
    images = [Image.open(pictures / name).convert("RGB") for name in NAMES]
    torch.testing.assert_close(features, encoded(model, images, projected=False))
    assert features.shape == (3, 32) and metadata["projected"] == "false"


def test_a_table_gives_a_row_a_row(tmp_path, tiny_folder, pictures):
    table = tmp_path / "table.csv"
    table.write_text('caption,where\n"a, b",z.png\nc,a/b/deep.png\nd,z.png\n')
    out = tmp_path / "features.safetensors"
    embed(tiny_folder, str(table), out, image_column="where", images=pictures)
    features, metadata = read(out)
    assert json.loads(metadata["ids"]) == ["z.png", "a/b/deep.png", "z.png"]
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])


def test_a_table_beside_its_images_needs_no_options(pictures):
    (pictures / "table.tsv").write_text("path\tcaption\nz.png\tc\n")
    assert find_embed_images(str(pictures / "table.tsv")).files == [pictures / "z.png"]


def test_shards_are_read_in_their_order(tmp_path, tiny_folder, drawn_shards):
    out = tmp_path / "features.safetensors"
    embed(tiny_folder, str(drawn_shards / "val"), out, batch_size=4)
    features, metadata = read(out)
    pairs = ShardPairs(drawn_shards / "val")
    model = load_model(tiny_folder).eval()
    torch.testing.assert_close(features, encoded(model, [pairs[i][0] for i in range(len(pairs))]))
    ids = json.loads(metadata["ids"])
    assert len(set(ids)) == len(pairs) == 6
    [tar] = (drawn_shards / "val").glob("*.tar")
    assert all(name.startswith(f"{tar.stem}/") for name in ids)


def test_what_was_encoded_once_is_found_in_the_cache(tmp_path, tiny_folder, pictures, monkeypatch):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    embed(tiny_folder, str(pictures), first, cache=tmp_path / "cache")
    monkeypatch.setattr(ContrastiveModel, "encode_image", lambda *_, **__: pytest.fail("it was encoded again"))
    embed(tiny_folder, str(pictures), second, cache=tmp_path / "cache")
    assert torch.equal(read(first)[0], read(second)[0])


def test_the_hash_of_the_data_is_of_ids_and_sizes_wherever_they_lie(tmp_path, pictures):
    before = find_embed_images(str(pictures)).sha256()
    pictures.rename(tmp_path / "moved")
    moved = find_embed_images(str(tmp_path / "moved"))
    assert moved.sha256() == before
    (tmp_path / "moved" / "z.png").write_bytes((tmp_path / "moved" / "z.png").read_bytes() + b"0")
    assert moved.sha256() != before


def test_a_broken_image_is_named_and_nothing_is_written(tmp_path, tiny_folder, pictures):
    (pictures / "a" / "first.JPG").write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(UserError, match=r"cannot read .*first.JPG \(not_an_image\); no image is left out"):
        embed(tiny_folder, str(pictures), tmp_path / "out" / "features.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_file_is_replaced_only_when_asked(tmp_path, tiny_folder, pictures):
    out = tmp_path / "features.safetensors"
    out.write_text("years of work")
    with pytest.raises(UserError, match=r"exists already; .* --overwrite"):
        embed(tiny_folder, str(pictures), out)
    assert out.read_text() == "years of work"
    embed(tiny_folder, str(pictures), out, overwrite=True)
    assert len(read(out)[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "features.pt"}, r"let its name end in .safetensors"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"data": "nowhere"}, "nowhere does not exist; give a folder of images"),
        ({"data": "empty"}, "holds no images .* and no shards"),
        ({"data": "nowhere.csv"}, "there is no such table"),
        ({"data": "table.csv", "image_column": "imag"}, "has no column imag; its columns are caption, file"),
        ({"data": "table.csv"}, r"1 of 1 images that .* do not exist, such as .*gone.png; say --images"),
        ({"data": "unnamed.csv"}, "say --image-column, one of caption, picture"),
        ({"data": "gap.csv"}, "row 2 of .* names no image in column file"),
        ({"data": "empty", "image_column": "file"}, "are for a table"),
    ],
)
def test_what_cannot_be_embedded_is_said(work, tiny_folder, options, message):
    (work / "empty").mkdir()
    (work / "table.csv").write_text("caption,file\na,gone.png\n")
    (work / "unnamed.csv").write_text("caption,picture\na,gone.png\n")
    (work / "gap.csv").write_text("caption,file\na,one.png\nb,\n")
    options = {"model": tiny_folder, "data": "table.csv", "out": "features.safetensors", **options}
    with pytest.raises(UserError, match=message):
        embed(**{**options, "out": work / options["out"]})


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(tmp_path, tiny_folder, pictures):
    features = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.safetensors"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks == 2 else []
        command = [sys.executable, *launcher, "-m", "quiltnet.cli.app", "embed", tiny_folder, str(pictures)]
        done = subprocess.run([*command, "--out", str(out)], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("3 images, 16 features each") == 1
        features[ranks], metadata = read(out)
        assert json.loads(metadata["ids"]) == NAMES
    torch.testing.assert_close(features[2], features[1])
