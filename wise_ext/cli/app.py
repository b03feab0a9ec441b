"""The commands put together. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .clusters import RayCommand
from .compare import compare
from .demo import demo
from .edit import edit
from .evaluate import evaluate
from .export import export
from .failures import CarefulGroup
from .generate import generate
from .hub import pull, push
from .info import info
from .lm_eval import lm_eval
from .profile import profile
from .serve import serve
from .stats import stats
from .stored import show, undo, verify

app = typer.Typer(
    cls=CarefulGroup,
    name="wise-ext",
    help="Edit what a language model knows, thousands of times in a row.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wise-ext {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Goes anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command; CarefulGroup reads ``debug``, its own callback ``version``."""


app.command("edit", cls=RayCommand)(edit)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("serve")(serve)
app.command("export")(export)
app.command("lm-eval")(lm_eval)
app.command("profile")(profile)
app.command("stats")(stats)
app.command("show")(show)
app.command("undo")(undo)
app.command("verify")(verify)
app.command("push")(push)
app.command("pull")(pull)
app.command("info")(info)
app.command("demo")(demo)
