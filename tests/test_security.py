"""Attacks by files: what was not written here is not unpickled, not run, and not let out of its folder.

SECURITY.md has the promises. Each attack that succeeds leaves a folder behind, ``marker``.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from safetensors.torch import save_file

from quiltnet.cli.embed_sources import find_embed_images
from quiltnet.data.decoding import BrokenSample, decode_image, decode_pil
from quiltnet.data.planning import PLAN_NAME, open_plan
from quiltnet.data.shard_files import ShardFile
from quiltnet.data.stored_pairs import StoredPairs
from quiltnet.data.tar_index import TarIndex, open_index, write_index
from quiltnet.errors import UserError
from quiltnet.evaluation.feature_cache import FeatureCache
from quiltnet.evaluation.h5_images import H5Images
from quiltnet.evaluation.label_archives import huggingface_labels, npz_labels
from quiltnet.evaluation.labelled_set import read_rgb
from quiltnet.image_opening import open_image
from quiltnet.model.assembly import build_model
from quiltnet.model.folder import CONFIG_NAME, WEIGHTS_NAME, write_description
from quiltnet.model.tokenizer import hugging_face_tokenizer
from quiltnet.model.transformers_clip import load_transformers_clip
from quiltnet.release.hub import load_model
from quiltnet.training.checkpoint import load_checkpoint
from tests import security_attacks as attacks
from tests.data.made_sets import encoded, pair, tissue, write_tar
from tests.model.towers import TINY_IMAGE, bert_folder, tiny_model
from tests.model.transformers_folder import save_clip, small_clip

PICKLES = pytest.mark.parametrize("pickled", [attacks.raw_pickle, attacks.torch_zip, attacks.torch_legacy])


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A small model's description, without weights."""
    folder = tmp_path_factory.mktemp("model")
    write_description(tiny_model(), folder)
    return folder


def copied(folder: Path, to: Path, **changed: object) -> Path:
    """The description of a model elsewhere, keys of its text tower changed."""
    to.mkdir()
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["model_cfg"]["text_cfg"].update(changed)
    (to / CONFIG_NAME).write_text(json.dumps(config))
    return to


@PICKLES
def test_the_pickles_of_these_tests_do_harm_where_they_are_trusted(pickled, marker):
    data = pickled(marker)
    if pickled is attacks.raw_pickle:
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


@PICKLES
@pytest.mark.parametrize("name", [WEIGHTS_NAME, "open_clip_pytorch_model.bin", "model.safetensors"])
def test_weights_of_a_folder_that_are_a_pickle_are_refused(pickled, name, model_folder, marker, tmp_path):
    folder = copied(model_folder, tmp_path / "folder")
    (folder / name).write_bytes(pickled(marker))
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_model(folder)
    assert not marker.exists()


@PICKLES
def test_a_start_that_is_a_pickle_is_refused(pickled, marker, tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(pickled(marker))
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_model(tmp_path / "ViT-B-32.pt")
    assert not marker.exists()


@PICKLES
def test_a_checkpoint_in_pickles_is_no_checkpoint(pickled, marker, tmp_path):
    """The names that a checkpoint had and has."""
    save_file({"logit_scale": torch.ones(())}, tmp_path / "model.safetensors")
    for name in ("train_state.pt", "optimizer.safetensors", "state.json", "manifest.json"):
        (tmp_path / name).write_bytes(pickled(marker))
    with pytest.raises(UserError, match="checkpoint"):
        load_checkpoint(tmp_path)
    assert not marker.exists()


def test_pickles_beside_and_within_data_are_not_opened(marker, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        npz_labels(attacks.npz(tmp_path / "set.npz", marker, "test_images", "test_labels"), ["a", "b"])
    with pytest.raises(BrokenSample, match="broken_image"):
        decode_image(attacks.npy(marker))
    (tmp_path / PLAN_NAME).write_text(json.dumps({"shards": [], "splits": [], "rejected": {}}))
    for name in ("rows", "starts", "images", "sources"):
        (tmp_path / f"plan-{name}.npy").write_bytes(attacks.npy(marker))
    with pytest.raises(ValueError, match=r"pickle|Python objects"):
        open_plan(tmp_path)
    (tmp_path / "key.safetensors").write_bytes(attacks.raw_pickle(marker))
    assert FeatureCache(tmp_path).load("key") is None
    assert not marker.exists()


def test_an_index_beside_a_tar_that_is_a_pickle_is_made_again(marker, tmp_path):
    tar = write_tar(tmp_path / "a.tar", pair("x", encoded(tissue(0)), "gland"))
    index = write_index(tar)
    index.write_bytes(attacks.raw_pickle(marker))
    found = open_index(tar)
    assert isinstance(found, TarIndex) and found.key(0) == "x" and found.file != index
    assert not marker.exists()


def test_members_that_other_readers_unpickle_are_passed_over(marker, tmp_path):
    """webdataset's default decoders open .pyd, .pickle, .pth and .npy."""
    members = pair("x", encoded(tissue(0)), "gland")
    members |= {f"x.{ending}": attacks.raw_pickle(marker) for ending in ("pyd", "pkl", "pickle", "cls")}
    members |= {"x.pth": attacks.torch_zip(marker), "x.npz": attacks.raw_pickle(marker)}
    pairs = StoredPairs([ShardFile(write_tar(tmp_path / "a.tar", members))])
    assert len(pairs) == 1 and decode_image(pairs[0].image).shape == (96, 96, 3)
    assert not marker.exists()


@pytest.mark.parametrize("decode", [decode_image, decode_pil, read_rgb])
@pytest.mark.parametrize("bomb", [attacks.png_bomb(), attacks.jpeg_bomb(encoded(tissue(0)))], ids=["png", "jpeg"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_would_fill_the_memory_is_refused_by_its_header(decode, bomb):
    with pytest.raises((BrokenSample, Image.DecompressionBombError), match="pixels"):
        decode(bomb)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_evaluation_sets_have_the_bound_of_training_where_pillow_only_warns():
    with pytest.raises(Image.DecompressionBombError, match="10000 x 10000"):
        read_rgb(attacks.png_bomb(10_000, 10_000))


@pytest.mark.parametrize("decode", [decode_image, decode_pil, read_rgb])
def test_a_postscript_program_called_jpg_starts_no_interpreter(decode, marker, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: marker.mkdir())
    with pytest.raises((BrokenSample, UnidentifiedImageError)):
        decode(attacks.POSTSCRIPT)
    assert not marker.exists()
    with pytest.raises((AssertionError, AttributeError)):  # Pillow by itself calls it; ours gives no image
        Image.open(io.BytesIO(attacks.POSTSCRIPT)).load()
    assert marker.exists()


def test_every_format_that_is_opened_is_one_of_pillows():
    Image.init()
    for format in ("PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "JPEG"):
        assert open_image(io.BytesIO(encoded(tissue(0), format))).size == (96, 96)


@pytest.mark.parametrize("outside", ["{secret}", "../secret.png", "in/../../secret.png"])
def test_a_table_to_embed_does_not_reach_files_elsewhere(outside, tmp_path):
    secret = tmp_path / "secret.png"
    tissue(0).save(secret)
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "t.csv").write_text(f"image_path\n{outside.format(secret=secret)}\n")
    with pytest.raises(UserError, match="stay below it"):
        find_embed_images(str(root / "t.csv"))


@pytest.mark.parametrize("kind", ["link", "folder that is a link", "storage", "virtual"])
def test_an_hdf5_file_does_not_lead_to_another(kind, tmp_path):
    import h5py

    tiles = np.zeros((2, 4, 4, 3), np.uint8)
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = tiles
    (tmp_path / "secret.raw").write_bytes(tiles.tobytes())
    with h5py.File(tmp_path / "set.h5", "w") as file:
        if kind == "link":
            file["x"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
        elif kind == "folder that is a link":
            file["g"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/")
        elif kind == "storage":
            place = [(str(tmp_path / "secret.raw"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("x", tiles.shape, np.uint8, external=place)
        else:
            layout = h5py.VirtualLayout(tiles.shape, np.uint8)
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", tiles.shape)
            file.create_virtual_dataset("x", layout)
    with pytest.raises(UserError, match="a reference to another file"):
        H5Images(tmp_path / "set.h5", "g/x" if kind == "folder that is a link" else "x")


def test_a_hugging_face_set_does_not_name_images_elsewhere(tmp_path):
    datasets = pytest.importorskip("datasets")
    tissue(0).save(tmp_path / "secret.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    stored = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2
    rows = datasets.Dataset.from_dict({"image": [encoded(tissue(0))] * 2, "label": ["a", "b"]}, features=features)
    rows.save_to_disk(str(tmp_path / "set"))
    assert huggingface_labels(tmp_path / "set")[0][1] == 0
    _write_rows(tmp_path / "set", rows, stored)
    with pytest.raises(UserError, match=r"secret\.png, which is outside"):
        huggingface_labels(tmp_path / "set")[0]
    state = tmp_path / "set" / "state.json"
    facts = json.loads(state.read_text())
    (tmp_path / "set" / facts["_data_files"][0]["filename"]).rename(tmp_path / "moved.arrow")
    facts["_data_files"][0]["filename"] = "../moved.arrow"
    state.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"moved\.arrow, which is outside"):
        huggingface_labels(tmp_path / "set")


def _write_rows(folder: Path, rows: object, stored: list[dict[str, object]]) -> None:
    """The data set's table with other images, as an older ``save_to_disk`` left it."""
    import pyarrow as pa

    (file,) = folder.glob("*.arrow")
    table = rows.data.table
    images = pa.array(stored, table.schema.field("image").type)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(pa.table([images, table.column("label")], schema=table.schema))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hf_tokenizer_name": "{outside}"}, "outside of the folder"),
        ({"hf_model_name": "{outside}"}, "outside of the folder"),
        ({"hf_model_name": "../outside"}, "outside of the folder"),
        ({"hf_tokenizer_name": "package:quiltnet/../x"}, "outside of the folder"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "Code of a repository is never run"),
        ({"tokenizer_kwargs": {"bpe_path": "{outside}/x.gz"}}, "Code of a repository is never run"),
    ],
)
def test_a_models_folder_names_nothing_outside_of_itself(changed, message, model_folder, tmp_path):
    named = json.loads(json.dumps(changed).replace("{outside}", str(bert_folder(tmp_path))))
    with pytest.raises(UserError, match=message):
        load_model(copied(model_folder, tmp_path / "folder", **named))


@pytest.mark.parametrize("part", ["tokenizer", "tower"])
def test_code_that_lies_in_a_models_folder_is_not_run(part, marker, tmp_path, monkeypatch):
    """``auto_map`` is how a repository has transformers run its files, once somebody has typed y."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    good, folder = bert_folder(tmp_path), tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: ...\n")
    text = {"hf_model_name": str(good), "hf_tokenizer_name": str(good), "context_length": 12}
    if part == "tokenizer":
        config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        text["hf_tokenizer_name"] = str(folder)
    else:
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
        text["hf_model_name"] = str(folder)
    with pytest.raises(UserError, match="never run"):
        build_model(image=TINY_IMAGE, text={**text, "hf_proj_type": "linear"}, embed_dim=16)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_file", "{secret}"),
        ("vocab", "{secret}"),
        ("init_inputs", ["{secret}"]),
        ("gguf_file", "../secret.txt"),
        ("fast_tokenizer_files", ["../tokenizer.4.0.0.json"]),
    ],
)
def test_a_tokenisers_configuration_names_no_file_elsewhere(key, value, tmp_path):
    """transformers reads each of them, ``vocab_file`` in 5.0: a word of the secret became a token."""
    folder, secret = bert_folder(tmp_path), tmp_path / "secret.txt"
    secret.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsmith\n")
    (tmp_path / "tokenizer.4.0.0.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    harmless = {
        "special_tokens_map_file": str(secret),
        "tokenizer_file": "/root/.cache/gone",
        "vocab_file": "vocab.txt",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **harmless}))
    assert "smith" not in hugging_face_tokenizer(str(folder), 12).open_clip_tokenizer.tokenizer.get_vocab()
    evil = json.loads(json.dumps({**config, key: value}).replace("{secret}", str(secret)))
    (folder / "tokenizer_config.json").write_text(json.dumps(evil))
    with pytest.raises(UserError, match=f"tokenizer_config.json: {key} is .*, outside of the folder"):
        hugging_face_tokenizer(str(folder), 12)


def test_an_index_of_weights_does_not_lead_out_of_its_folder(tmp_path):
    folder = save_clip(small_clip(), tmp_path / "clip")
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"logit_scale": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names \.\./secret\.safetensors"):
        load_transformers_clip(folder)
