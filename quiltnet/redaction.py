"""Secrets taken out of what is written down, sent or printed: tokens, keys, passwords, signed URLs.

What is known as a secret: the value of a name that says so (``api_key``, ``hf_token``, ``password``), tokens of known
shapes, user names and passwords in URLs, and whatever the environment holds under such a name.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

HIDDEN = "***"

_SECRET_ENDINGS = (
    "accesskey", "accesskeyid", "apikey", "authorization", "connectionstring", "cookie", "credential", "credentials",
    "passphrase", "passwd", "password", "privatekey", "secret", "secretkey", "signature", "token"
)  # fmt: skip
_SECRET_NAMES = {"auth", "sig"}
# A tokeniser's, of text.
_SPECIAL_TOKENS = {f"{name}token" for name in ("bos", "cls", "eos", "mask", "pad", "sep", "stripsep", "unk")}
_SHORTEST = 8  # of a value in the environment that is looked for: shorter ones are words

_SHAPES = re.compile(
    r"""(?x)
    (?<![A-Za-z0-9]) (?:
        hf_[A-Za-z0-9]{16,}                                  # Hugging Face
      | wandb_v\d+_\w{16,} | local-[0-9a-f]{40}              # Weights & Biases
      | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{20,}
      | (?:AKIA|ASIA)[0-9A-Z]{16} | AIza[\w-]{35} | ya29\.[\w-]{20,}   # Amazon, Google
      | sk-[\w-]{20,} | xox[abprs]-[\w-]{10,}
      | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+                   # a signed JSON web token
    )"""
)
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_SCHEME = re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^\s/'\"]+@")
_GOOGLE_KEY = re.compile(r"([?&]key=)[^\s&#'\"]+")
# From the beginning of a word alone: to begin anew at each of its letters takes a long one hours.
_NAMED = re.compile(r"""(?<![\w.-])([\w.-]+)["']?\s*[=:]\s*""")
_VALUE = re.compile(r"""(["'])(?P<quoted>.*?)\1|(?!//)[^\s"'&]+""", re.DOTALL)
_CLOSING = ",;)}]"
_PATH = re.compile(
    r"[/~.\\]|[A-Za-z]:\\|\w[\w+.-]*://|pipe:|outputs/|(?:[^/]*/){2}|.*\.(?:tar|csv|tsv|parquet|npz|h5|xlsx)$"
)

# Where a config says which files are read; their names can be those of patients.
_PLACE_KEYS = {
    "cache", "checkpoint", "data_root", "file", "folder", "images", "output", "output_dir", "path", "resume", "root",
    "shards", "sources", "table"
}  # fmt: skip


def redact(text: str) -> str:
    """``text`` with every secret that is known as one replaced by ``***``."""
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    text = _KEY_BLOCK.sub(HIDDEN, text)
    text = _SCHEME.sub(rf"\g<1>{HIDDEN}", text)
    text = _IN_URL.sub(f"{HIDDEN}@", text)
    text = _GOOGLE_KEY.sub(rf"\g<1>{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, _hide_named(text))


def redact_config(value: Any, name: str = "") -> Any:
    """A config (mappings, lists and plain values) with its secrets replaced; it is copied, not changed.

    Args:
        name: under which the value stands. One that says so makes its text or number a secret, whatever it is.
    """
    if isinstance(value, Mapping):
        return {redact(key) if isinstance(key, str) else key: redact_config(of, str(key)) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_config(of, name) for of in value]
    if is_secret_name(name) and isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "":
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def hide_places(value: Any, name: str = "") -> Any:
    """A config without names of files and folders: what may leave the machine where samples may not.

    Hidden is all text below the keys that name files, and all text elsewhere that is a path; names of the hub are not.
    """
    if isinstance(value, Mapping):
        below = name if name in _PLACE_KEYS else None
        return {key: hide_places(of, below or str(key)) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_places(of, name) for of in value]
    is_place = isinstance(value, str) and (name in _PLACE_KEYS or _PATH.match(value))
    return HIDDEN if is_place else value


def redact_command(arguments: Sequence[str]) -> list[str]:
    """The words of a command line, of which ``name=secret``, ``--name secret`` and ``--name=secret`` are hidden."""
    hidden = []
    for position, word in enumerate(arguments):
        name, sign, _ = word.partition("=")
        before = arguments[position - 1] if position else ""
        if sign and is_secret_name(_last_part(name)):
            hidden.append(f"{name}={HIDDEN}")
        elif before.startswith("--") and "=" not in before and is_secret_name(before):
            hidden.append(HIDDEN)
        else:
            hidden.append(redact(word))
    return hidden


def is_secret_name(name: str) -> bool:
    """Whether a value of that name is a secret by its name alone."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return (plain.endswith(_SECRET_ENDINGS) and plain not in _SPECIAL_TOKENS) or plain in _SECRET_NAMES


def print_redacted_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:  # as sys.excepthook
    """What Python prints of an exception that nobody caught, without secrets: clients put whole URLs in theirs."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _hide_named(text: str) -> str:
    """Values behind ``name=`` and ``name:``, in quotes or not."""
    kept, end = [], 0
    for found in _NAMED.finditer(text):
        value = _VALUE.match(text, found.end()) if is_secret_name(_last_part(found[1])) else None
        if value is None or found.start() < end:
            continue
        first, last = value.span("quoted") if value["quoted"] is not None else value.span()
        if value["quoted"] is None:
            last = first + len(value[0].rstrip(_CLOSING))
        kept += [text[end:first], HIDDEN]
        end = last
    return "".join([*kept, text[end:]])


def _last_part(name: str) -> str:
    """``token`` of ``logger.hub.token``."""
    return name.rpartition(".")[2]


def _of_environment() -> list[str]:
    """Values of variables whose names say that they are secrets, long ones first."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and is_secret_name(name)}
    return sorted(values, key=len, reverse=True)
