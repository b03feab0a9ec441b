"""The bar of a bench: how many of its cases are measured, for how long, and which one is next."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def case_progress() -> Progress:
    """A bar on standard error that leaves nothing behind; a task's description names its case."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
