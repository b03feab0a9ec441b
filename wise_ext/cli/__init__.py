"""The command line: parses, calls the Python API, prints."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run ``wise-ext`` with ``args`` (default: the process's own) and exit with its status."""
    from .app import app

    app(args=None if args is None else list(args), prog_name="wise-ext")


__all__ = ["main"]
