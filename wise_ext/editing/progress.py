"""A progress bar on standard error, for anything that calls back with (done, total)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

ProgressCallback = Callable[[int, int], None]


@contextmanager
def progress_bar(description: str, shown: bool = True) -> Iterator[ProgressCallback]:
    """Show a bar while the block runs; yields the function that moves it.

    Nothing is drawn where standard error is not a terminal, or ``shown`` is False.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )
    with bar:
        task = bar.add_task(description, total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield move


@contextmanager
def counted(
    description: str, total: int, progress: bool | ProgressCallback = True
) -> Iterator[Callable[[int], None]]:
    """A bar for work that reports what it has just done: yields ``tick(rows)``.

    Args:
        description: shown before the bar.
        total: rows altogether.
        progress: a bar or none, or a function called with (done, total) instead.
    """
    done = 0
    shown = nullcontext(progress) if callable(progress) else progress_bar(description, progress)
    with shown as move:

        def tick(rows: int) -> None:
            nonlocal done
            done += rows
            move(done, total)

        yield tick
