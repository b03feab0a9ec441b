"""``--ray [ADDRESS]``: who trains the steps of ``wise-ext edit``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..editing.editor import Editor
    from ..editing.training import Trainer
    from ..integrations.ray_editing import Cluster, Load

#: Stands for a cluster of this machine alone.
LOCAL = "local"
_ADDRESS = re.compile(rf"{LOCAL}|auto|ray://.+|\S+:\d+")


class RayCommand(TyperCommand):
    """A command whose ``--ray`` need not be followed by an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say the address that is left out."""
        return super().parse_args(ctx, with_address(args))


def with_address(args: list[str]) -> list[str]:
    """Arguments in which every ``--ray`` is followed by an address."""
    end = args.index("--") if "--" in args else len(args)
    told: list[str] = []
    for place, arg in enumerate(args):
        told.append(arg)
        following = args[place + 1] if place + 1 < end else ""
        if arg == "--ray" and place < end and not _ADDRESS.fullmatch(following):
            told.append(LOCAL)
    return told


@contextmanager
def connected(address: str | None, workers: int | None) -> Iterator[Cluster | None]:
    """The cluster at an address; None without one.

    Raises:
        ClusterError: it cannot be used.
        ConfigError: workers without a cluster.
    """
    if address is None:
        if workers is not None:
            raise ConfigError("--ray-workers is of --ray: say that, too")
        yield None
        return
    from ..integrations.ray_editing import Cluster

    with Cluster(None if address == LOCAL else address, workers) as cluster:
        yield cluster


def loader(model: str, *, dtype: str, device: str) -> Load:
    """Loads the model of a command line anywhere; a worker sees no other card than its own."""
    from ..models import load_model

    name = str(Path(model).resolve()) if Path(model).exists() else model
    return partial(load_model, name, dtype=dtype, device=device.partition(":")[0])


def trainer(
    cluster: Cluster | None, editor: Editor, load: Load, edits: int, method: str
) -> AbstractContextManager[Trainer | None]:
    """A context of the cluster's workers, each with the model; None without a cluster.

    Raises:
        ClusterError: there is no room for them.
    """
    if cluster is None:
        return nullcontext()
    return cluster.trainer(editor, load, edits, method)
