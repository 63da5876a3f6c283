"""OpenAI's own files and the QuiltNets as they were published: loaded as they were trained, or refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from quiltnet.errors import UserError
from quiltnet.model.assembly import build_model
from quiltnet.model.folder import read_description
from quiltnet.model.published_layouts import known_bert, openai_description
from quiltnet.release.exporting import export_open_clip
from quiltnet.release.hub import load_model
from quiltnet.training.engine import train_step
from tests.model.published import PUBMEDBERT, TEXT, VISION, openai_clip, save_openai, save_pmb
from tests.model.transformers_folder import save_clip, small_clip
from tests.model.tuned import contrast, start

CAPTIONS = ["Fatty tissue of a gland.", "glands"]


@pytest.fixture(scope="module")
def openai_file(tmp_path_factory):
    return save_openai(openai_clip(), tmp_path_factory.mktemp("openai") / "ViT-T-16.pt")


@torch.no_grad()
def features(clip, context_length: int = 12):
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = open_clip.SimpleTokenizer(context_length=context_length)(CAPTIONS)
    return clip.eval().encode_image(image), clip.encode_text(text)


def test_openais_file_tells_architecture_and_activation(openai_file):
    model = load_model(openai_file)
    assert model.description.model_cfg["quick_gelu"] is True
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(features(model.clip), features(openai_clip(quick_gelu=True)), rtol=0, atol=0)
    difference = features(model.clip)[0] - features(openai_clip(quick_gelu=False))[0]
    assert difference.abs().max() > 1e-3, "the activation must be seen in the features"


def test_openais_shapes_tell_a_resnet_too():
    cfg = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
    clip = open_clip.CLIP(24, cfg, TEXT)
    found = openai_description(clip.state_dict()).model_cfg
    assert found == {"embed_dim": 24, "quick_gelu": True, "vision_cfg": cfg, "text_cfg": TEXT}


def test_an_architecture_takes_the_activation_of_openais_file(openai_file, monkeypatch, caplog):
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(config)))
    model = build_model("ViT-B-32", pretrained=str(openai_file))
    torch.testing.assert_close(features(model.clip), features(openai_clip()), rtol=0, atol=0)
    assert "assumed" not in caplog.text
    with pytest.raises(UserError, match=r"quick_gelu=False was asked for.*trained with quick_gelu=True"):
        build_model("ViT-B-32", pretrained=str(openai_file), quick_gelu=False)


def test_an_assumed_activation_is_said_with_the_option_that_changes_it(tmp_path, monkeypatch, caplog):
    """Tensors alone do not tell it, and the wrong one loads without an error."""
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(config)))
    file = tmp_path / "weights.safetensors"
    save_file(openai_clip().state_dict(), file)
    build_model("ViT-B-32", pretrained=str(file))
    assert "GELU is assumed, and model.quick_gelu=true is the other" in caplog.text
    caplog.clear()
    model = build_model("ViT-B-32", pretrained=str(file), quick_gelu=True)
    assert not caplog.text
    torch.testing.assert_close(features(model.clip), features(openai_clip()), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"do not say which model they are of.*model.pretrained="):
        load_model(file)


def test_an_archive_that_is_not_openais_does_not_tell_its_activation(tmp_path):
    with pytest.raises(UserError, match="do not say which model they are of"):
        load_model(save_openai(openai_clip(), tmp_path / "traced.pt", marked=False))


def test_code_in_a_folder_that_was_not_named_is_not_opened(tmp_path):
    folder = save_pmb(tmp_path / "pmb")
    save_openai(openai_clip(), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="TorchScript archive, which holds code; to open it, name that file itself"):
        load_model(folder)


def test_the_first_quiltnets_folder_loads_trains_and_is_exported(tmp_path, caplog):
    model = load_model(save_pmb(tmp_path / "pmb"))
    assert "text_cfg.proj is an old name of open_clip's; read as hf_proj_type='mlp'" in caplog.text
    assert "BERT-base's is taken, with the weights' sizes" in caplog.text

    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    state = start(model)
    text = model.tokenize(CAPTIONS)
    for _ in range(2):
        train_step(state, SimpleNamespace(image=torch.rand(2, 3, 160, 160), text=text, second_image=None), contrast)
    unchanged = [name for name, tensor in model.clip.state_dict().items() if torch.equal(tensor, before[name])]
    assert not unchanged

    assert export_open_clip(model, tmp_path / "out") <= 1e-5
    exported = json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert exported["hf_proj_type"] == "mlp" and "proj" not in exported
    again = load_model(tmp_path / "out").eval()
    torch.testing.assert_close(again.encode_text(text), model.eval().encode_text(text))


def test_a_known_berts_configuration_is_read_off_its_weights():
    """PubMedBERT's on the hub is that of BERT-base, which is transformers' default."""
    with torch.device("meta"):
        shapes = BertModel(BertConfig()).state_dict()
    weights = {f"text.transformer.{name}": tensor for name, tensor in shapes.items()}
    assert known_bert(PUBMEDBERT, weights).to_dict() == BertConfig().to_dict()
    assert known_bert("some/bert", weights) is None
    assert known_bert(PUBMEDBERT, {}) is None


def test_pubmedberts_vocabulary_and_256_tokens(tmp_path, shared_data):
    model = load_model(save_pmb(tmp_path / "pmb", shared_data / "biomedbert_vocab/vocab.txt")).eval()
    config = model.clip.text.config
    assert (config.vocab_size, config.num_hidden_layers, config.max_position_embeddings) == (30522, 2, 512)
    ids = model.tokenize(["Adenocarcinoma of the colon.", "gland " * 300])
    assert ids.shape == (2, 256)
    assert (ids != model.tokenize.pad_id).sum(-1).tolist() == [7, 256]  # [CLS], five pieces, [SEP]; and cut
    torch.testing.assert_close(model.encode_text(ids[:1]), model.encode_text(ids[:1, :7]))


def test_old_and_new_keys_that_disagree_are_refused(tmp_path):
    folder = save_pmb(tmp_path / "pmb")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_proj_type"] = "linear"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="proj='mlp' and hf_proj_type='linear'"):
        read_description(folder)
    config["model_cfg"]["text_cfg"] = {"hf_model": "x"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not know: hf_model"):
        read_description(folder)


def test_a_patch_size_that_is_not_the_weights_is_said_as_quiltnets_defect(tmp_path):
    folder = save_clip(small_clip(), tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["patch_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r'says patch_size 16.* patches of 8 pixels.*write "patch_size": 8'):
        load_model(folder)
