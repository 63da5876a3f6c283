"""Configuration, data, environment and the way to run again: the tables of a report that are not scores."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quiltnet.redaction import HIDDEN, hide_places
from quiltnet.release.report_subjects import Subject
from quiltnet.release.run_files import flattened

# Of some two hundred, those that move numbers or speed.
PACKAGES = (
    "quiltnet", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "tokenizers", "accelerate",
    "webdataset", "safetensors", "numpy", "pillow", "simplejpeg", "triton", "peft"
)  # fmt: skip
# How a run is started and watched: every run differs from every other in these.
NOT_COMPARED = {"run_name", "output_dir", "overwrite", "resume", "allow_changes"}
ABSENT = "–"


@dataclass(frozen=True)
class FactTable:
    """``rows``: (name, a text a column)."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Reproduction:
    """``notes``: what the commands cannot bring back."""

    subject: str
    commands: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Facts:
    """``shows_places``: whether names of files and folders, which can be those of patients, are shown."""

    shows_places: bool

    def config_differences(self, subjects: Sequence[Subject]) -> FactTable:
        """The keys whose values are not the same in all subjects."""
        flat = [flattened(subject.config) for subject in subjects]
        differing = [key for key in _keys(flat) if len({_text(config.get(key, ABSENT)) for config in flat}) > 1]
        shown = [flattened(self._shown(subject.config)) for subject in subjects]
        keys = [key for key in differing if key.partition(".")[0] not in NOT_COMPARED]
        return _table(subjects, {key: [config.get(key, ABSENT) for config in shown] for key in keys})

    def config_tables(self, subject: Subject) -> dict[str, FactTable]:
        """The whole configuration, a table a section; the keys outside sections come first, as ``run``."""
        sections: dict[str, dict[str, list[Any]]] = {"run": {}}
        for key, value in flattened(self._shown(subject.config)).items():
            section, _, rest = key.partition(".")
            if rest:
                sections.setdefault(section, {})[rest] = [value]
            else:
                sections["run"][key] = [value]
        return {name: _table([subject], rows) for name, rows in sections.items() if rows}

    def data_table(self, subjects: Sequence[Subject]) -> FactTable:
        """What each run was fed: its pairs, what their set left out, what could not be used while it ran."""
        runs = [subject for subject in subjects if subject.run is not None]
        found = [_data_facts(subject, self._shown(subject.environment.get("data", {}))) for subject in runs]
        return _table(runs, {key: [facts.get(key, ABSENT) for facts in found] for key in _keys(found)})

    def reproduction(self, subject: Subject) -> Reproduction | None:
        """The commands that run it again; None where its own is not known."""
        command = subject.environment.get("command")
        if not command:
            return None
        ranks = int(subject.environment.get("world_size") or 1)
        commands, notes = _checkout(str(subject.environment.get("git") or ""))
        if ranks > 1:
            notes.append(f"It ran in {ranks} processes; on several machines give torchrun --nnodes as well.")
        words = [str(command[0]), *(self._shown_word(str(word)) for word in command[1:])]
        if HIDDEN in " ".join(words):
            notes.append("Fill in what is hidden as ***.")
        launcher = [] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
        if words[0].endswith(".py"):
            launcher = launcher or ["python"]
        elif launcher:
            launcher.append("--no-python")
        commands.append(" ".join(map(_quoted, [*launcher, *words])))
        return Reproduction(subject.name, commands, notes)

    def _shown(self, value: Any) -> Any:
        return value if self.shows_places else hide_places(value)

    def _shown_word(self, word: str) -> str:
        """A word of a command line; of ``key=value`` the value by its key."""
        key, sign, value = word.partition("=")
        if self.shows_places or not sign:
            return self._shown(word)
        return f"{key}={hide_places(value, key.rpartition('.')[2])}"


def environment_table(subjects: Sequence[Subject]) -> FactTable:
    """Hardware, code and the packages that matter."""
    found = [_environment_facts(subject.environment) for subject in subjects]
    return _table(subjects, {key: [facts.get(key, ABSENT) for facts in found] for key in _keys(found)})


def _checkout(git: str) -> tuple[list[str], list[str]]:
    """The command that brings the code back, and what it cannot bring back."""
    if not git:
        return [], ["The code was not in a git repository: its revision is not known."]
    dirty = ["The working directory had changes that were not committed; the commit alone lacks them."]
    return [f"git checkout {shlex.quote(git.removesuffix('-dirty'))}"], dirty if git.endswith("-dirty") else []


def _quoted(word: str) -> str:
    """For a shell; what is hidden stays readable, as nobody can run it anyway."""
    return word if HIDDEN in word and " " not in word else shlex.quote(word)


def _data_facts(subject: Subject, data: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {f"training {key}": value for key, value in flattened(data).items()}
    facts["pairs seen"] = subject.run.samples_seen
    if subject.manifest is not None:
        totals = subject.manifest["totals"]
        facts["table rows"] = totals.get("rows")
        facts["images in the shard set"] = totals.get("images")
        facts["captions in the shard set"] = totals.get("captions")
        for split, content in subject.manifest["splits"].items():
            facts[f"samples of split {split}"] = content.get("samples")
        for reason, count in totals.get("rejected", {}).items():
            facts[f"rows left out: {reason.replace('_', ' ')}"] = count
    broken = subject.run.broken_samples()
    facts["broken samples met"] = sum(broken.values())
    facts.update({f"broken: {reason.replace('_', ' ')}": count for reason, count in sorted(broken.items())})
    return {name: f"{value:,}" if isinstance(value, int) else value for name, value in facts.items()}


def _environment_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    if not environment:
        return {}
    gpus = Counter(environment.get("gpus") or [])
    packages = environment.get("packages", {})
    return {
        "started": environment.get("time", ABSENT),
        "GPUs": ", ".join(f"{count} × {name}" for name, count in gpus.items()) or "none",
        "CPU cores": environment.get("cpus", ABSENT),
        "processes": environment.get("world_size", ABSENT),
        "platform": environment.get("platform", ABSENT),
        "git": environment.get("git") or ABSENT,
        "python": environment.get("python", ABSENT),
        **{name: packages[name] for name in PACKAGES if name in packages},
    }


def _table(subjects: Sequence[Subject], rows: Mapping[str, Sequence[Any]]) -> FactTable:
    texts = [(name, [_text(value) for value in values]) for name, values in rows.items()]
    return FactTable([subject.name for subject in subjects], texts)


def _text(value: Any) -> str:
    """As the config file would say it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "{}" if value == {} else str(value)


def _keys(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
