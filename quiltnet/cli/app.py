"""The ``quiltnet`` command. Each command imports what it needs when it runs, so that ``--help`` is immediate."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import quiltnet
from quiltnet.cli.app_server import serve
from quiltnet.cli.check import check
from quiltnet.cli.doctor import doctor
from quiltnet.cli.door import at_the_door
from quiltnet.cli.embed import embed
from quiltnet.cli.explain import explain
from quiltnet.cli.export import export
from quiltnet.cli.merge import merge
from quiltnet.cli.prepare import prepare
from quiltnet.cli.report import report
from quiltnet.cli.shard import shard
from quiltnet.cli.teach import teach

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune, measure and publish CLIP-type models on histopathology image-caption pairs.",
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(quiltnet.__version__)
        raise typer.Exit


# In the order of the work, which is that of --help.
app.command()(shard)
app.add_typer(check, name="check")
app.command()(prepare)
app.command()(teach)


@app.command(context_settings=_PASS_ON)
def train(context: typer.Context) -> None:
    """Train a model: Hydra options (run_name=… model=… data.train.shards=…), as of train.py; --help lists them."""
    from quiltnet.cli.hydra_main import train_main

    train_main(context.args)


@app.command(context_settings=_PASS_ON)
def sweep(context: typer.Context) -> None:
    """Search for good values of options (sweep=optuna n_trials=20 …), a process a trial; --help lists what it takes."""
    from quiltnet.cli.search import sweep

    sweep(context.args)


@app.command("eval", context_settings=_PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Evaluate models: Hydra options (checkpoint=… evaluator=[…]), as of eval.py; --help lists them."""
    from quiltnet.cli.hydra_main import eval_main

    eval_main(context.args)


app.command()(report)
app.command()(explain)
app.command("app")(serve)
app.command()(embed)
app.command()(merge)
app.command()(export)
app.command()(doctor)

main = at_the_door(app)

if __name__ == "__main__":
    sys.exit(main())
