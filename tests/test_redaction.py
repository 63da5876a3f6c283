"""Secrets and names of patients: neither is in what a run writes down, prints, or shows to others."""

from __future__ import annotations

import sys
import time

import pytest

from quiltnet.cli.door import leave_if_user_error
from quiltnet.cli.run_directory import check_run_directory, create_run_directory
from quiltnet.data.remote_files import RemoteFile, Unreachable
from quiltnet.errors import UserError
from quiltnet.redaction import HIDDEN, hide_places, print_redacted_traceback, redact, redact_command, redact_config
from quiltnet.training.checkpoint import save_checkpoint
from quiltnet.training.loggers import TensorBoardLogger, WandbLogger, shown_config
from tests.data.http_server import QUICK, Fault, serving

TOKEN = "hf_" + "aB3dE5" * 6
SIGNED = "https://bucket.s3.amazonaws.com/a.tar?X-Amz-Credential=AKIDxyz%2F2026&X-Amz-Expires=60&X-Amz-Signature=5ec5e7"
SECRETS = (TOKEN, "AKIDxyz", "5ec5e7", "pa55word", "0123456789abcdef0123456789abcdef01234567", "s1gned%2Fsas")
CONFIG = {
    "seed": 3,
    "model": {"tokenizer": None, "pad_token": "<pad>", "hf_model_name": "microsoft/BiomedBERT"},
    "data": {"train": {"shards": [SIGNED, "https://user:pa55word@host/b.tar?sig=s1gned%2Fsas&sv=2"]}},
    "logger": {"wandb": {"project": "quilt", "api_key": SECRETS[4]}},
    "note": f"fetched with {TOKEN}",
    "storage_options": {"anon": False, "password": "pa55word"},
}


def without_secrets(text: str) -> bool:
    return not [secret for secret in SECRETS if secret in text]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (SIGNED, "https://bucket.s3.amazonaws.com/a.tar?X-Amz-Credential=***&X-Amz-Expires=60&X-Amz-Signature=***"),
        ("cannot open https://user:pa55word@host/b.tar, retrying", "cannot open https://***@host/b.tar, retrying"),
        ("postgresql://me:pa55word@db/optuna", "postgresql://***@db/optuna"),
        ("url=https://h/a?sv=1&sig=s1gned%2Fsas&x=2'", "url=https://h/a?sv=1&sig=***&x=2'"),
        (f"401 for Authorization: Bearer {TOKEN}.", "401 for Authorization: *** ***"),
        (f"{{'token': '{TOKEN}', 'n': 1}}", "{'token': '***', 'n': 1}"),
        ("export WANDB_API_KEY=pa55word; go", "export WANDB_API_KEY=***; go"),
        (f"git clone https://{TOKEN}@huggingface.co/x", "git clone https://***@huggingface.co/x"),
        ("aws AKIAIOSFODNN7EXAMPLE ok", "aws *** ok"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\n", "***\n"),
    ],
)
def test_secrets_are_taken_out_of_text_and_nothing_else(text, kept):
    assert redact(text) == kept
    assert redact(kept) == kept


@pytest.mark.parametrize(
    "text",
    [
        "outputs/run@ema", "hub:org/name", "ViT-B-32:openai", "s3://bucket/a-{000..101}.tar", "model.tokenizer=x",
        "strip_sep_token: true", "token recognition error at: '{'", "hf_model_pretrained", "key=x of set.h5",
        "https://huggingface.co/a/resolve/main/x.tar?download=true", "a1b2c3d4e5f60718293a4b5c6d7e8f9012345678",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_a_long_word_takes_no_longer_than_its_length():
    """A picture within a card, or an array in a traceback: by trying each of its letters anew it took minutes."""
    start = time.perf_counter()
    text = "0123456789abcdef" * 4000 + "-a" * 4000
    assert redact(f"{text} token={TOKEN}") == f"{text} token={HIDDEN}"
    assert time.perf_counter() - start < 2


def test_a_secret_of_the_environment_is_known_wherever_it_appears(monkeypatch):
    monkeypatch.setenv("MY_STORE_PASSWORD", "correct horse")
    monkeypatch.setenv("MY_STORE_NAME", "battery staple")
    assert redact("wrong: correct horse, battery staple") == "wrong: ***, battery staple"


def test_a_config_keeps_all_but_its_secrets():
    redacted = redact_config(CONFIG)
    assert without_secrets(repr(redacted))
    assert redacted["seed"] == 3 and redacted["model"] == CONFIG["model"]
    assert redacted["logger"] == {"wandb": {"project": "quilt", "api_key": HIDDEN}}
    assert redacted["storage_options"] == {"anon": False, "password": HIDDEN}
    assert redact_config(redacted) == redacted


def test_a_command_line_keeps_all_but_its_secrets():
    words = [
        "train.py",
        "run_name=x",
        f"+hub.token={TOKEN}",
        "--password",
        "pa55word",
        "--token=a b",
        f"shards={SIGNED}",
    ]
    kept = redact_command(words)
    assert kept[:6] == ["train.py", "run_name=x", "+hub.token=***", "--password", HIDDEN, "--token=***"]
    assert without_secrets(kept[6]) and kept[6].startswith("shards=https://bucket")


def test_a_run_directory_holds_no_secret_and_the_run_goes_on_with_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"data.train.shards={SIGNED}", f"+token={TOKEN}"])
    data = {"samples": 4}
    run = check_run_directory(tmp_path / "run", CONFIG, data, resume=None, overwrite=False)
    create_run_directory(run, CONFIG, data)
    written = {path.name: path.read_text() for path in run.path.iterdir() if path.is_file()}
    assert {"config.yaml", "environment.json"} <= written.keys()
    assert all(map(without_secrets, written.values()))
    assert "X-Amz-Expires=60" in written["config.yaml"] and "+token=***" in written["environment.json"]
    save_checkpoint(run.checkpoints, _state())
    renewed = {**CONFIG, "storage_options": {"anon": False, "password": "another"}}
    assert check_run_directory(run.path, renewed, data, resume="auto", overwrite=False).checkpoint is not None
    elsewhere = {**CONFIG, "note": f"another, by {TOKEN}"}
    with pytest.raises(UserError, match="note: fetched with") as refused:
        check_run_directory(run.path, elsewhere, data, resume="auto", overwrite=False)
    assert without_secrets(str(refused.value))


def test_neither_messages_nor_tracebacks_have_secrets(capsys):
    with pytest.raises(SystemExit):
        leave_if_user_error(UserError(f"{SIGNED} cannot be read with {TOKEN}; give another"))
    try:
        raise OSError(f"403, url='{SIGNED}'")
    except OSError as error:
        print_redacted_traceback(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "give another" in printed and "Traceback" in printed and "OSError: 403" in printed
    assert without_secrets(printed)


def test_a_remote_shard_that_is_refused_is_named_without_its_secrets():
    with serving() as server:
        server.files["a.tar"] = b"x"
        server.faults["a.tar"] = [Fault("refuse", status=403)]
        url = server.url("a.tar?X-Amz-Signature=5ec5e7").replace("://", "://user:pa55word@")
        with RemoteFile(url, QUICK) as file, pytest.raises(Unreachable, match="403") as refused:
            file.read(1)
    assert "/a.tar" in str(refused.value) and without_secrets(str(refused.value))


def test_trackers_get_no_secrets_no_places_and_only_numbers(tmp_path, monkeypatch):
    begun, logged = {}, []

    class Run:
        def define_metric(self, *_, **__) -> None: ...

        def log(self, row) -> None:
            logged.append(row)

    monkeypatch.setattr("quiltnet.training.loggers.wandb.init", lambda **settings: begun.update(settings) or Run())
    config = {**CONFIG, "data_root": "Mueller_Hans", "evaluator": {"x": {"table": "/data/Mueller_Hans/labels.csv"}}}
    metrics = {"train/loss": 1.5, "worst": "H&E of Hans Mueller", "tile": object()}
    for share in (False, True):
        tracker = WandbLogger(mode="offline")
        tracker.start(tmp_path, "run", {**config, "share_samples": share})
        tracker.log(metrics, 64)
    assert logged == [{"samples_seen": 64, "train/loss": 1.5}, {"samples_seen": 64, **metrics}]
    assert begun["config"]["data_root"] == "Mueller_Hans" and without_secrets(repr(begun))  # the second, which shares
    assert begun["settings"].x_disable_meta and begun["settings"].disable_git and begun["settings"].disable_code


def test_places_are_hidden_and_choices_are_not():
    shown = shown_config({**CONFIG, "share_samples": False, "seed": 3})
    assert shown["data"] == {"train": {"shards": [HIDDEN, HIDDEN]}}
    assert shown["model"]["hf_model_name"] == "microsoft/BiomedBERT" and shown["seed"] == 3
    config = {
        "evaluator": {"x": {"_target_": "quiltnet.evaluation.knn.KNN", "dataset": {"root": "Mueller", "split": "val"}}},
        "data": {"train": {"sources": {"ward": {"shards": "Mueller.tar", "weight": 0.5}}, "workers": 4}},
        "model": {"pretrained": "openai", "source": "outputs/Mueller", "tokenizer": "/home/me/Mueller"},
    }
    hidden = hide_places(config)
    assert "Mueller" not in repr(hidden)
    assert hidden["evaluator"]["x"] == {
        "_target_": "quiltnet.evaluation.knn.KNN",
        "dataset": {"root": HIDDEN, "split": "val"},
    }
    assert hidden["data"]["train"] == {"sources": {"ward": {"shards": HIDDEN, "weight": 0.5}}, "workers": 4}
    assert hidden["model"]["pretrained"] == "openai"


def test_tensorboard_files_hold_neither(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger()
    logger.start(tmp_path, "run", {**CONFIG, "data_root": "/data/Mueller_Hans"})
    logger.log({"train/loss": 1.5, "caption": "Hans Mueller"}, 64)
    logger.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes().decode("latin-1")
    assert "quilt" in written and "train/loss" in written
    assert without_secrets(written) and "Mueller" not in written


def _state() -> dict:
    import torch

    from quiltnet.training.random_state import random_state

    return {
        "weights": {"logit_scale": torch.ones(())},
        "optimizer": {"state": {}, "param_groups": []},
        "samples_seen": 4,
        "random": [random_state(torch.device("cpu"))],
    }
