"""quiltnet.load, of whatever lies where: runs and their checkpoints, exports, the hub."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import quiltnet
from quiltnet.errors import UserError
from quiltnet.model.adapters import Tuning, apply_tuning
from quiltnet.model.assembly import build_model
from quiltnet.model.folder import write_description
from quiltnet.release import downloading, hub
from quiltnet.release.exporting import export_open_clip
from quiltnet.training.checkpoint import save_checkpoint
from tests.conftest import ROOT
from tests.model.published import openai_clip, save_openai
from tests.model.towers import TINY_IMAGE, TINY_TEXT, tiny_model
from tests.model.transformers_folder import save_clip, small_clip

CAPTIONS = ["fatty tissue of a gland", "glands"]


def test_a_folder_of_transformers_loads_and_is_exported(tmp_path):
    folder = save_clip(small_clip(), tmp_path / "clip")
    ours = quiltnet.load(folder)
    assert export_open_clip(ours.model, tmp_path / "out") <= 1e-5
    shutil.rmtree(folder)
    torch.testing.assert_close(quiltnet.load(tmp_path / "out").encode_text(CAPTIONS), ours.encode_text(CAPTIONS))


@pytest.mark.parametrize("layout", ["transformers", "open_clip", "both"])
def test_the_hub_may_hold_either_layout(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(downloading, "snapshot_download", lambda name, **_: str(tmp_path / name))
    if layout != "open_clip":
        save_clip(small_clip(), tmp_path / "some/model")
    if layout != "transformers":
        export_open_clip(tiny_model(), tmp_path / "export")
        shutil.copytree(tmp_path / "export", tmp_path / "some/model", dirs_exist_ok=True)
    assert hub.load_model("hub:some/model").image_size == 32
    width = hub.load_model("hub:some/model").description.model_cfg["vision_cfg"]["width"]
    assert width == (48 if layout == "transformers" else 32), "open_clip's layout is the more exact one"


def test_a_repository_of_neither_layout_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "snapshot_download", lambda name, **_: str(tmp_path))
    with pytest.raises(UserError, match=r"hub:some/model is no model: .*names CLIPModel"):
        hub.load_model("hub:some/model")


class StoredRepository:
    """``snapshot_download`` over a folder, as the hub's client picks files by patterns; remembers what was fetched."""

    def __init__(self, stored, cache):
        self.stored, self.cache, self.revisions = stored, cache / "0f1e2d", []

    def __call__(self, name, *, revision, allow_patterns):
        self.revisions.append(revision)
        names = [path.relative_to(self.stored).as_posix() for path in self.stored.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.stored / name, self.cache / name)
        return str(self.cache)

    @property
    def fetched(self):
        return {path.name for path in self.cache.rglob("*") if path.is_file()}


def test_of_a_repository_only_what_a_model_is_read_from_is_fetched(tmp_path, monkeypatch):
    stored = save_clip(small_clip(), tmp_path / "stored")
    (stored / "onnx").mkdir()
    for name in ("pytorch_model.bin", "dino_checkpoint.pth.tar", "modeling.py", "README.md", "onnx/inputs.json"):
        (stored / name).write_text("no model")
    repository = StoredRepository(stored, tmp_path / "cache")
    monkeypatch.setattr(downloading, "snapshot_download", repository)
    assert hub.load_model("hub:some/model@v2").image_size == 32
    assert repository.revisions == ["v2", "0f1e2d"], "weights of the commit that the description is of"
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
    assert repository.fetched == expected | {"tokenizer_config.json"}


def test_a_repository_with_pickles_alone_loads_as_the_first_quiltnets_do(tmp_path, monkeypatch):
    stored = tmp_path / "stored"
    export_open_clip(tiny_model(), stored)
    (stored / "open_clip_model.safetensors").unlink()
    torch.save(tiny_model().clip.state_dict(), stored / "open_clip_pytorch_model.bin")
    torch.save({}, stored / "pytorch_model.bin")
    repository = StoredRepository(stored, tmp_path / "cache")
    monkeypatch.setattr(downloading, "snapshot_download", repository)
    assert hub.load_model("hub:some/model").image_size == 32
    assert {name for name in repository.fetched if name.endswith(".bin")} == {"open_clip_pytorch_model.bin"}


def save_run(path, model, samples_seen=8, monitored=None, **average):
    """A run directory with one more checkpoint: ``model`` as it is."""
    write_description(model, path / "model")
    state = {
        "samples_seen": samples_seen,
        "weights": model.clip.state_dict(),
        "optimizer": {},
        "random": [],
        "monitored": monitored and {"metric": "val_pairs/loss", "value": monitored, "lower_is_better": True},
    }
    return save_checkpoint(path / "checkpoints", {**state, **average})


def test_averaged_weights_of_a_run_or_checkpoint(tmp_path):
    model = tiny_model()
    average = {name: tensor + 1 for name, tensor in model.clip.state_dict().items()}
    checkpoint = save_run(tmp_path / "run", model, average=average)
    for source in (tmp_path / "run", checkpoint):
        torch.testing.assert_close(hub.load_model(source).clip.state_dict(), model.clip.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(hub.load_model(f"{source}@ema").clip.state_dict(), average, rtol=0, atol=0)


def test_where_there_is_no_average_it_is_said(tmp_path):
    save_run(tmp_path / "run", tiny_model())
    with pytest.raises(UserError, match=r"has no average.safetensors, .*model.safetensors.*leave out @ema"):
        hub.load_model(f"{tmp_path / 'run'}@ema")
    export_open_clip(tiny_model(), tmp_path / "out")
    for suffix in ("@ema", "@best"):
        with pytest.raises(UserError, match="neither a run directory nor a checkpoint, and only they keep an average"):
            hub.load_model(f"{tmp_path / 'out'}{suffix}")


def test_the_best_checkpoint_of_a_run(tmp_path):
    first, last = tiny_model(), build_model(image=TINY_IMAGE, text=TINY_TEXT, embed_dim=16)
    average = {name: tensor + 1 for name, tensor in first.clip.state_dict().items()}
    save_run(tmp_path / "run", last, samples_seen=4)
    with pytest.raises(UserError, match=r"no best checkpoint.*callbacks\.keep_best=1, or leave out @best"):
        hub.load_model(f"{tmp_path / 'run'}@best")
    best = save_run(tmp_path / "run", first, samples_seen=8, monitored=0.5, average=average)
    save_run(tmp_path / "run", last, samples_seen=16, monitored=0.7)
    expected = {"": last.clip.state_dict(), "@best": first.clip.state_dict(), "@best@ema": average}
    for suffix, weights in expected.items():
        loaded = hub.load_model(f"{tmp_path / 'run'}{suffix}").clip.state_dict()
        torch.testing.assert_close(loaded, weights, rtol=0, atol=0)
    with pytest.raises(UserError, match="is one checkpoint; @best stands behind a run directory"):
        hub.load_model(f"{best}@best")


def test_the_run_that_a_source_is_of(tmp_path):
    checkpoint = save_run(tmp_path / "run", tiny_model())
    for name in (f"{tmp_path / 'run'}", f"{tmp_path / 'run'}@best@ema", f"{checkpoint}@ema"):
        assert hub.read_source(name).run == tmp_path / "run"
    assert hub.read_source("ViT-B-32:openai").run is None


def test_a_run_with_adapters_loads_as_a_plain_model(tmp_path):
    model = tiny_model()
    names = set(model.clip.state_dict())
    apply_tuning(model, Tuning(image="lora", text="frozen"))
    for name, parameter in model.clip.named_parameters():
        if "lora_B" in name:  # zeros at the start
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    save_run(tmp_path / "run", model)
    plain = hub.load_model(tmp_path / "run")
    assert set(plain.clip.state_dict()) == names
    assert all(parameter.requires_grad for parameter in plain.clip.parameters())
    image = torch.rand(2, 3, 32, 32)
    tuned = model.eval().encode_image(image)
    torch.testing.assert_close(plain.eval().encode_image(image), tuned, atol=1e-5, rtol=0)
    assert (tuned - tiny_model().eval().encode_image(image)).abs().max() > 1e-2, "the adapters must matter"
    assert hub.load_model(tmp_path / "run", image_size=64).image_size == 64
    # An export of the model with adapters is of the merged one.
    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    torch.testing.assert_close(hub.load_model(tmp_path / "out").eval().encode_image(image), tuned, atol=1e-5, rtol=0)
    assert any("lora" in name for name in model.clip.state_dict()), "the run goes on with its own"


def test_every_layout_may_be_changed_at_the_start(tmp_path):
    """By the options of conf/model/start.yaml, which names the function."""
    export_open_clip(tiny_model(), tmp_path / "exported")
    save_run(tmp_path / "run", tiny_model())
    save_clip(small_clip(), tmp_path / "transformers")
    save_openai(openai_clip(), tmp_path / "openai.pt")
    save_file(build_model("ViT-S-32-alt").clip.state_dict(), tmp_path / "tag.safetensors")
    start = OmegaConf.load(ROOT / "conf/model/start.yaml")
    for name in ("exported", "run", "transformers", "openai.pt", f"ViT-S-32-alt:{tmp_path / 'tag.safetensors'}"):
        source = name if ":" in name else str(tmp_path / name)
        changes = {"image_size": 64, "context_length": 16, "init_logit_bias": -10, "batchnorm": "train"}
        model = instantiate(start, source=source, **changes)
        assert (model.image_size, model.tokenize.context_length, model.batchnorm) == (64, 16, "train")
        assert model.logit_bias.item() == -10
        assert model.encode_image(torch.rand(1, 3, 64, 64)).isfinite().all()
        assert model.encode_text(model.tokenize(["a gland"])).isfinite().all()
    with pytest.raises(UserError, match="batchnorm='sync': choose one of frozen"):
        hub.load_model(tmp_path / "run", batchnorm="sync")


def test_features_are_the_same_whatever_the_batches():
    embedder = hub.Embedder(tiny_model(), batch_size=2)
    images = [Image.new("L", (40 + i, 60), i * 40) for i in range(5)]
    one_by_one = torch.cat([embedder.encode_images([image]) for image in images])
    torch.testing.assert_close(embedder.encode_images(images), one_by_one)
    assert embedder.encode_images(images).dtype == torch.float32
    assert embedder.encode_images([]).shape == embedder.encode_text([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "is no model: give a run directory"),
        ("hub:some/model", r"the model some/model could not be fetched.*give a local folder"),
        ("hub:some/model/of", r"some/model/of could not be fetched.*Repo id must be"),
        ("ViT-B-99:openai", "unknown architecture"),
    ],
)
def test_what_is_no_model_is_said_with_what_would_be(source, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        quiltnet.load(source)


@pytest.mark.parametrize(
    ("layout", "file", "path", "value"),
    [
        ("open_clip", "open_clip_config.json", "preprocess_cfg", None),
        ("open_clip", "open_clip_config.json", "preprocess_cfg mean", "bright"),
        ("open_clip", "open_clip_config.json", "model_cfg text_cfg heads", 0),
        ("open_clip", "open_clip_config.json", "model_cfg text_cfg layers", 0),
        ("transformers", "config.json", "vision_config patch_size", []),
        ("transformers", "config.json", "architectures", 3),
        ("transformers", "preprocessor_config.json", "image_mean", None),
        ("transformers", "preprocessor_config.json", "size", 1.5),
        ("transformers", "model.safetensors.index.json", "weight_map", None),
    ],
)
def test_a_description_of_nothing_is_told_without_a_traceback(tmp_path, layout, file, path, value):
    folder = tmp_path / "model"
    if layout == "open_clip":
        export_open_clip(tiny_model(), folder)
    else:
        save_clip(small_clip(), folder)
    if file.endswith(".index.json"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / file).write_text("{}")
    place = content = json.loads((folder / file).read_text())
    *above, last = path.split()
    for key in above:
        place = place[key]
    place[last] = value
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(str(folder))):
        quiltnet.load(folder)
