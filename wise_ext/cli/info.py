"""``wise-ext info``: what is installed, how it was built, which backend each op takes and why."""

from __future__ import annotations

from typing import Annotated

import typer


def info(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show versions, the build, CPU features, and which backend each operation would use."""
    from json import dumps

    from ..diagnostics import collect, render

    report = collect()
    typer.echo(dumps(report, indent=2) if json else render(report))
