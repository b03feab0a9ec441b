"""Printing: results to standard output, notes and complaints to standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 10_000


def say(text: str, style: str = "") -> None:
    """A line of result. Never wrapped, never read as markup."""
    Console().print(Text(text, style=style), soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """A remark on standard error."""
    _errors().print(Text(text, style="yellow"), soft_wrap=True, highlight=False)


def complain(text: str) -> None:
    """An error on standard error, in red, on one line."""
    _errors().print(Text(f"error: {text}", style="bold red"), soft_wrap=True, highlight=False)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()
) -> None:
    """A table of plain values; ``None`` shows as a dash, columns in ``right`` align right.

    Written to a file or a pipe it takes the width it needs.
    """
    right = set(right)
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for name in columns:
        view.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        view.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(view)


def metrics_table(title: str, report: dict[str, object]) -> None:
    """The nested dict of an evaluation, a line a number."""
    table(title, ("metric", "value"), list(_flat(report)), right=("value",))


def route_name(route: int | None) -> str | None:
    """A route in words: ``main``, ``shard 3``, or nothing."""
    return None if route is None else "main" if route < 0 else f"shard {route}"


def number_of(count: int, what: str) -> str:
    """A count in words: ``1 shard``, ``3 shards``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def shortened(text: str, width: int = 48) -> str:
    """A text on one line, cut where it is longer than ``width``."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= width else line[: width - 1] + "…"


def size_name(size: float) -> str:
    """Bytes for people: 1536 → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _errors() -> Console:
    return Console(stderr=True)


def _flat(report: dict[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in report.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value
            yield prefix + key, str(text)
