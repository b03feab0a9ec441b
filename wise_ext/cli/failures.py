"""Every failure becomes one line on standard error and an exit status.

2: the input or the surroundings are at fault (bad file, full disk); 130: Ctrl-C; 1: anything else.
"""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import WiseError
from .console import complain

BAD_INPUT = 2
INTERRUPTED = 130
UNEXPECTED = 1


class CarefulGroup(TyperGroup):
    """The command group: takes ``--debug`` anywhere and turns exceptions into exit statuses."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move ``--debug`` in front of the command, whose own option it is not."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(a for a in args[:end] if a != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with the status that the failure calls for.
        """
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)) or _is_usage(error):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            complain(describe(error))
            raise typer.Exit(status_of(error)) from None


def status_of(error: BaseException) -> int:
    """The exit status for an exception that a command let through."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, (WiseError, OSError)) else UNEXPECTED


def describe(error: BaseException) -> str:
    """One line about an exception."""
    if isinstance(error, WiseError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = str(error) or "interrupted"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}: check the disk, the path and its rights"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = "out of memory: use a smaller --batch-size, a smaller --dtype or a smaller model"
    else:
        lines = str(error).strip().splitlines() or ["no message"]  # torch adds pages to some
        text = f"unexpected {type(error).__name__}: {lines[0][:300]} (--debug shows where)"
    return " ".join(text.split())


def _is_usage(error: BaseException) -> bool:
    # a usage error knows how to show itself; its class has moved between versions of typer
    return hasattr(error, "show") and hasattr(error, "exit_code")
