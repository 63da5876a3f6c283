"""``quiltnet sweep``: search for good values of options, a process a trial."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from quiltnet.errors import UserError

USAGE = """\
quiltnet sweep sweep=optuna n_trials=20 run_name=rates "evaluator=[val_pairs]" model=… data.train.shards=… …

Options of the search (conf/sweep/optuna.yaml says what is searched):
  n_trials=20           in all, with those of earlier starts and of other drivers
  parallel=1            trials at once
  nproc_per_trial=1     processes of a trial, each with a GPU of its own where there are GPUs
  sampler=tpe           tpe | random;  sampler_seed=0
  pruner=hyperband      hyperband | none
  direction=null        minimize | maximize; null: by the metric's name
  storage=null          null: SQLite in the sweep's folder; or sqlite:///file, postgresql://…
  search.optim.lr.high=1e-2    "+search.loss={choices: [infonce, siglip]}"    ~search.optim.weight_decay
Everything else is an option of the trials, as of `quiltnet train`. The same command goes on with an interrupted
sweep."""


def sweep(arguments: Sequence[str]) -> None:
    """Search as the command line says; an interrupted search goes on with the same command.

    Raises:
        UserError: what was asked cannot be done; nothing was trained then.
        SystemExit: interrupted (130), or no trial was completed (1).
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    for package in ("optuna", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'quiltnet sweep needs {package}: pip install "quiltnet[sweep]"')
    from quiltnet.cli.search_config import plan_search, share_gpus
    from quiltnet.cli.search_driver import SearchDriver
    from quiltnet.cli.search_results import print_results

    plan = plan_search(arguments)
    gpus = share_gpus(plan)
    if plan.pruner == "hyperband" and not plan.prunes:
        print("note: callbacks.evaluate_every_samples is not set, so that no trial can be pruned", file=sys.stderr)
    driver = SearchDriver(plan, gpus=gpus)
    try:
        with _interruptible():
            driver.run()
    except KeyboardInterrupt:
        again = shlex.join(["quiltnet", "sweep", *arguments])
        print(f"interrupted; its trials go on with the same command:\n  {again}", file=sys.stderr)
        raise SystemExit(130) from None
    if not print_results(plan, driver.study):
        raise SystemExit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end a search as Ctrl-C does; unless they were to be ignored (nohup)."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
