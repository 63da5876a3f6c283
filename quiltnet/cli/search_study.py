"""The memory of a search: an optuna study in a database, which several drivers share and any of them continues."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from quiltnet.cli.search_plan import SearchPlan
from quiltnet.cli.search_space import Value
from quiltnet.errors import UserError, first_line

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

DEFINITION = "definition"
PLACE = "place"
_MARK = "sweep.id"
# How long another writer may hold the database.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Claim:
    """A trial that this driver runs now.

    Attributes:
        values: of the options that are searched.
        facts: what the driver that had it before wrote down of it; empty for a new one.
    """

    number: int
    values: Mapping[str, Value]
    facts: Mapping[str, Any]
    trial: Trial


class SearchStudy:
    """Trials of a search.

    Each driver holds a lock for as long as it lives; the system lets go of it when the driver dies, however that
    happens. So a trial that runs by the database, and whose driver's lock is free, was left behind.

    Raises:
        UserError: by every method: the database cannot be used, or holds another search.
    """

    def __init__(self, plan: SearchPlan, patience_s: float = PATIENCE_S) -> None:
        self._plan = plan
        self._driver = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        try:
            (plan.folder / "drivers").mkdir(parents=True, exist_ok=True)
            self._turn = FileLock(plan.folder / "sweep.lock", timeout=patience_s)
            self._life = self._lock_of(self._driver)
            self._life.acquire()
        except OSError as error:
            raise UserError(f"{plan.folder} cannot be written ({error}); choose another output_dir") from error
        with self._database(), self._turn:
            self._study = _open_study(plan, patience_s)

    def claim(self) -> Claim | None:
        """The next trial: one that a dead driver left behind, or else a new one; None when all are taken."""
        import optuna

        with self._database(), self._turn:
            trials = self._study.get_trials(deepcopy=False)
            left = next((trial for trial in trials if self._is_left_behind(trial)), None)
            waits = sum(trial.state == optuna.trial.TrialState.WAITING for trial in trials)
            if left is None and len(trials) - waits >= self._plan.n_trials:
                return None
            # A seed for each trial: several drivers, and one that continues, would else draw the same numbers again.
            number = len(trials) if left is None else left.number
            self._study.sampler = _make_sampler(self._plan.sampler, self._plan.sampler_seed, number)
            trial = self._study.ask() if left is None else optuna.trial.Trial(self._study, left._trial_id)
            values = {name: parameter.suggest(name, trial) for name, parameter in self._plan.space.items()}
            facts = trial.user_attrs
            trial.set_user_attr("driver", self._driver)
        return Claim(trial.number, values, facts, trial)

    def note(self, claim: Claim, name: str, fact: Any) -> None:
        """Write down what the table, or a driver that takes over, must know of a trial."""
        with self._database():
            claim.trial.set_user_attr(name, fact)

    def report(self, claim: Claim, samples: int, value: float) -> bool:
        """A number of a trial as it is logged; whether the trial is one to end now."""
        with self._database():
            if samples in claim.trial.storage.get_trial(claim.trial._trial_id).intermediate_values:
                return False  # measured again by a trial that was continued
            claim.trial.report(value, samples)
            return claim.trial.should_prune()

    def finish(self, claim: Claim, state: str, value: float | None, reason: str) -> None:
        """``state``: COMPLETE, PRUNED or FAIL."""
        import optuna

        if reason:
            self.note(claim, "reason", reason)
        with self._database():
            value = value if state == "COMPLETE" else None  # of a pruned one optuna takes the last report itself
            self._study.tell(claim.trial, value, state=optuna.trial.TrialState[state])

    def forget(self, claim: Claim) -> None:
        """Leave a trial to whoever comes next."""
        self.note(claim, "driver", None)

    def is_mine_alone(self) -> bool:
        """Whether no other driver has a trial of it."""
        return all(trial.user_attrs.get("driver") in (None, self._driver) for trial in self.trials)

    @property
    def study(self) -> Study:
        return self._study

    @property
    def trials(self) -> list[FrozenTrial]:
        with self._database():
            return self._study.get_trials(deepcopy=False)

    def close(self) -> None:
        self._life.release()

    def remove(self) -> None:
        """Take the search out of the database, which may be another's too."""
        import optuna

        with self._database():
            optuna.delete_study(study_name=self._plan.name, storage=self._study._storage)

    def _is_left_behind(self, trial: FrozenTrial) -> bool:
        if trial.state.name != "RUNNING":
            return False
        driver = trial.user_attrs.get("driver")
        if driver is None:  # killed between two lines of claim, or forgotten
            return True
        if driver == self._driver:
            return False
        try:
            with self._lock_of(driver).acquire(timeout=0):
                return True
        except Timeout:
            return False

    def _lock_of(self, driver: str) -> FileLock:
        return FileLock(self._plan.folder / "drivers" / f"{driver}.lock")

    @contextmanager
    def _database(self) -> Iterator[None]:
        """What a database says is wrong with it, in words."""
        import optuna
        import sqlalchemy

        url = self._plan.storage_url
        try:
            yield
        except Timeout as error:
            raise UserError(f"{error.lock_file} is held by another driver for too long; is it stopped?") from error
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
            raise UserError(f"the sweep's storage {url} cannot be used: {_remedy(error)}") from error


def _open_study(plan: SearchPlan, patience_s: float) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    arguments = {"connect_args": {"timeout": patience_s}} if plan.storage_url.startswith("sqlite") else {}
    storage = optuna.storages.RDBStorage(plan.storage_url, engine_kwargs=arguments)
    study = optuna.create_study(
        storage=storage,
        study_name=plan.name,
        direction=plan.direction,
        pruner=_make_pruner(plan),
        load_if_exists=True,
    )
    begun_with = study.user_attrs.get(DEFINITION)
    if begun_with is None:
        _mark(study, plan)
        study.set_user_attr(DEFINITION, plan.definition())
        return study
    _check_place(study, plan)
    if begun_with != plan.definition():
        raise UserError(_difference(plan, begun_with))
    return study


def _mark(study: Study, plan: SearchPlan) -> None:
    """One database may hold many searches: this one belongs to its folder, wherever that is moved."""
    mark = secrets.token_hex(8)
    (plan.folder / _MARK).write_text(mark, encoding="utf-8")
    study.set_user_attr(PLACE, {"mark": mark, "folder": str(plan.folder.resolve())})


def _check_place(study: Study, plan: SearchPlan) -> None:
    place, mark = study.user_attrs.get(PLACE), plan.folder / _MARK
    if place is not None and (not mark.is_file() or mark.read_text(encoding="utf-8") != place["mark"]):
        raise UserError(
            f"the sweep's storage holds a sweep {plan.name} already, of the folder {place['folder']}, and this is "
            f"{plan.folder}; choose another run_name or storage"
        )


def _difference(plan: SearchPlan, begun_with: Mapping[str, Any]) -> str:
    now = plan.definition()
    changed = sorted(name for name in begun_with.keys() | now.keys() if begun_with.get(name) != now.get(name))
    shown = "; ".join(f"{name}: {begun_with.get(name)} then, {now.get(name)} now" for name in changed[:6])
    return (
        f"{plan.folder} holds another sweep, whose trials would not compare with new ones ({shown}); give the options "
        "of the first start, or choose another run_name"
    )


def _make_sampler(name: str, seed: int, number: int) -> Any:
    import optuna

    seed = (seed * 1_000_003 + number) % 2**32
    if name == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed)


def _make_pruner(plan: SearchPlan) -> Any:
    import optuna

    if not plan.prunes:
        return optuna.pruners.NopPruner()
    # Without a total, optuna takes that of the first trial that is done, and prunes nothing before.
    return optuna.pruners.HyperbandPruner(
        min_resource=plan.first_samples, max_resource=plan.total_samples or "auto", reduction_factor=3
    )


def _remedy(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = first_line(error)
    if isinstance(error, ImportError):
        return f"{text}: install the database's driver, for postgresql:// pip install 'psycopg[binary]'"
    if "locked" in text:
        return f"{text}: another program holds it; close that, then give the same command again"
    if "readonly" in text or "unable to open" in text:
        return f"{text}: it needs a folder that you may write; choose another output_dir or storage"
    if "not a database" in text or "malformed" in text:
        return f"{text}: restore it, or choose another run_name"
    return text
