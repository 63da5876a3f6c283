"""A user's mistake ends in one message and exit code 2; a mistake of ours keeps its traceback."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, ParamSpec

from quiltnet.errors import UserError
from quiltnet.redaction import print_redacted_traceback, redact

P = ParamSpec("P")

SHARD_QUOTES = "\"data.train.shards='quilt/train-{000000..000101}.tar'\""

_PLUGINS = {
    "submitit_slurm": "; pip install hydra-submitit-launcher",
    "submitit_local": "; pip install hydra-submitit-launcher",
    "ray": "; pip install hydra-ray-launcher",
}

# What a disk may refuse, wherever it is asked; any other OSError is ours to answer for.
_DISK = {
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.EROFS: "give a place on a disk that can be written to",
    errno.ENOSPC: "make room, or give a place on another disk",
    errno.EDQUOT: "make room, or give a place on another disk",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a part of the path is a file; give a folder",
}

# torchrun ends all ranks as soon as one has failed: the others give rank 0 this long to print its message first.
_PATIENCE_S = 5.0

# Reports and progress bars of libraries that read these when imported: our own lines say what is loaded.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def at_the_door(command: Callable[P, Any]) -> Callable[P, None]:
    """Wrap a command: exit 2 with one message for a user's mistake, Hydra's own complaints included."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        # Otherwise Hydra prints errors itself and exits with 1.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        sys.excepthook = print_redacted_traceback
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted; a training run goes on with resume=auto", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            leave_if_user_error(error)
            raise

    return wrapped


def leave_if_user_error(error: Exception) -> None:
    """Print the message and exit with 2, if it is one that the user can put right."""
    message = message_for_user(error)
    if message is None:
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE_S)
    print(f"error: {redact(message)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def refuse_multirun_under_torchrun(arguments: list[str]) -> None:
    """Hydra runs the trials of a sweep one after another in this process, which torchrun has started W times."""
    if "TORCHELASTIC_RUN_ID" in os.environ and {"-m", "--multirun"} & set(arguments):
        raise UserError(
            "a sweep cannot run under torchrun: each rank would start trials of its own. Run `python train.py -m …` "
            "on one device, or start one torchrun a trial, for example "
            "`for lr in 1e-5 1e-4; do torchrun --nproc-per-node 8 train.py run_name=lr_$lr optim.lr=$lr; done`"
        )


def message_for_user(error: BaseException) -> str | None:
    """The message, if the user can put it right."""
    seen: BaseException | None = error
    while seen is not None:  # hydra.utils.instantiate wraps what a constructor raised
        if isinstance(seen, UserError):
            return str(seen)
        seen = seen.__cause__
    if isinstance(error, OSError) and error.errno in _DISK:
        place = "" if error.filename is None else f"{str(error.filename)[:200]}: "
        return f"{place}{error.strerror}; {_DISK[error.errno]}"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            f"{error} The usual reason is memory, or a small /dev/shm: take fewer data.train.workers or a smaller "
            "batch; resume=auto goes on"
        )
    from hydra.errors import HydraException, InstantiationException  # here: --help must not wait for Hydra
    from omegaconf import errors

    if isinstance(error, InstantiationException):
        # A key that no constructor takes is a misspelt one; whatever else goes wrong in a constructor is ours.
        text = str(error.__cause__)
        return f"a key of the config is misspelt: {text}" if "unexpected keyword argument" in text else None
    # What is raised for a command line or a config file; OmegaConf's other errors would be bugs of ours.
    mistakes = (HydraException, errors.GrammarParseError, errors.InterpolationResolutionError)
    if isinstance(error, (*mistakes, errors.InterpolationKeyError, errors.MissingMandatoryValue)):
        return _config_message(error)
    return None


def _config_message(error: BaseException) -> str:
    from omegaconf import errors

    text = str(error).strip()
    if "mismatched input '{'" in text or "token recognition error at: '{'" in text:
        return f"{text}\nA brace pattern needs Hydra's own quotes: {SHARD_QUOTES}"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing[1]} is not set; say {missing[1]}=…"
    choice = re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'", text)
    if choice:
        group, name = choice.groups()
        if group == "hydra/launcher":
            return f"there is no launcher {name}: its plugin is not installed{_PLUGINS.get(name, '')}"
        options = _options_of(group, text)
        near = difflib.get_close_matches(name, options, n=3, cutoff=0.3)
        nearest = f"; the nearest: {', '.join(near)}" if near else ""
        hint = _open_clip_hint(name) if group == "model" else ""
        return f"there is no {group}={name}{nearest}. The options: {', '.join(options)}{hint}"
    option = re.search(r"Could not override '([^']+)'.\nTo append to your config use (\S+)", text)
    cause = error.__cause__
    if option and isinstance(cause, errors.OmegaConfBaseException) and cause.parent_node is not None:
        near = _nearest_options(option[1], cause.parent_node._get_root())
        nearest = f"; the nearest: {', '.join(near)}" if near else ""
        return f"there is no option {option[1]}{nearest}. --help lists all; one of your own is added by {option[2]}"
    return text


def _nearest_options(name: str, cfg: Any) -> list[str]:
    """Options of the same last name in another place, or else of a similar name."""
    from omegaconf import OmegaConf

    from quiltnet.cli.options import option_names

    options = [option for option in option_names(OmegaConf.to_container(cfg)) if not option.startswith("hydra.")]
    last = name.rpartition(".")[2]
    same = [option for option in options if option.rpartition(".")[2] == last]
    return same[:3] or difflib.get_close_matches(name, options, n=3)


def _options_of(group: str, text: str) -> list[str]:
    """Files of a config group, in the folder that Hydra says it has searched."""
    folder = re.search(r"provider=main, path=file://(\S+)", text)
    conf = Path(folder[1]) if folder else resources.files("quiltnet.conf")
    return sorted(
        entry.name.removesuffix(".yaml") for entry in (conf / group).iterdir() if entry.name.endswith(".yaml")
    )


def _open_clip_hint(name: str) -> str:
    import open_clip

    near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4) or ["ViT-L-14"]
    return f". open_clip's own architectures: model=open_clip model.architecture={near[0]}"
