"""``wise-ext push`` and ``pull``: memories to and from a hub repository or a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import FolderArgument
from .console import number_of, say

_REPO = "owner/name on the hub, or a folder's path."


def push(
    directory: FolderArgument,
    repo: Annotated[str, typer.Argument(metavar="REPO", help=_REPO, show_default=False)],
    metrics: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE", help="What 'wise-ext eval --json' wrote."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Of a repository that is made now.")
    ] = False,
) -> None:
    """Copy a memory, with a model card, to a hub repository or a folder."""
    report = None if metrics is None else _report(metrics)

    from ..integrations.hub import push as copy

    say(f"pushed to {copy(directory, repo, report=report, private=not public)}", style="green")


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help=_REPO, show_default=False)],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder for it.", show_default=False)
    ],
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit of the repository.")
    ] = None,
) -> None:
    """Bring a memory from a hub repository or a folder, verified."""
    from ..integrations.hub import pull as bring

    stored = bring(repo, directory, revision=revision)
    say(
        f"{number_of(len(stored.ledger), 'edit')} of {stored.base.get('name')} verified and saved "
        f"in {directory}",
        style="green",
    )


def _report(path: Path) -> dict[str, Any]:
    from ..errors import DataError

    try:
        report = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise DataError(f"--eval {path} is no report: give what 'wise-ext eval --json' wrote")
    return report
