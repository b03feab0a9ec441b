"""``wise-ext edit --ray``: the parts of an editing run trained side by side on a Ray cluster.

The driver plans, takes what comes back in order and keeps the journal; workers train. Each has the
model and what is made of it, and is refused unless that came out as it did here, to the bit: so
does what it trains.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch

from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.dispatch import in_order
from wise_ext.editing.editor import Editor
from wise_ext.editing.edits import Edit
from wise_ext.editing.ledger import ANYEDIT, EditReport, method_for
from wise_ext.editing.planning import Task
from wise_ext.editing.training import LocalTrainer, Progress, Trained, no_progress
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import WiseError

#: Makes the model and its tokenizer, on any machine of the cluster.
Load = Callable[[], tuple[Any, Any]]

# Parts a worker that may be in work or wait for their turn: what one is ahead of the others.
_AHEAD = 4
# How often a step is tried again whose worker died.
_RETRIES = 3
# Seconds in which a cluster has to answer.
_PATIENCE = 5.0


class ClusterError(WiseError):
    """A Ray cluster cannot be used: it is missing, out of reach, too small, or unlike this
    machine."""


class Recipe(NamedTuple):
    """What a worker is made of, and what it has to come out as (``Workshop.digest``)."""

    load: Load
    config: WiseConfig
    anyedit: AnyEditConfig
    threads: int
    digest: str


class EditingWorker:
    """Trains steps in a process of the cluster; a Ray actor. One that was restarted makes itself
    anew when it is given something to do."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._trainer: LocalTrainer | None = None
        self._part = -1

    def arrive(self) -> None:
        """Load the model and see that all is as it is at the driver.

        Raises:
            ClusterError: it is not.
        """
        self._made()

    def train(self, task: Task) -> Trained:
        """Train a step."""
        trainer = self._made()
        if task.part != self._part:
            self._part = task.part
            trainer.forget()
        entries, tensors = trainer.step(task)
        # A tensor may be part of a larger one, all of which would travel.
        return Trained(entries, {name: tensor.clone() for name, tensor in tensors.items()})

    def cpu_seconds(self) -> float:
        """CPU time of this process."""
        return time.process_time()

    def _made(self) -> LocalTrainer:
        if self._trainer is None:
            recipe = self._recipe
            torch.set_num_threads(recipe.threads)
            model, tokenizer = recipe.load()
            shop = Workshop(model.eval(), tokenizer, recipe.config)
            if shop.digest() != recipe.digest:
                raise ClusterError(
                    f"a worker on {socket.gethostname()} computes otherwise than this machine, so "
                    "edits would come out otherwise, too: give all machines the same model files, "
                    "packages and kind of processor"
                )
            self._trainer = LocalTrainer(shop, recipe.anyedit)
        return self._trainer


class Cluster:
    """A connection to a Ray cluster, made when entered and given up when left.

    Args:
        address: of a cluster that runs (``host:port``, ``auto``, ``ray://…``); None starts one on
            this machine for as long as the connection lasts. A process that is connected already
            stays with what it has.
        workers: how many processes train; None takes as many as there is room for.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        self._address = address
        self._workers = workers
        self._threads = torch.get_num_threads()
        self._ours = False

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ClusterError: Ray is not installed, or the cluster does not answer.
        """
        ray = _ray()
        if ray.is_initialized():
            return self
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if self._address is None:
            room = max(1, len(os.sched_getaffinity(0)) // self._threads)
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            size = {"num_cpus": (self._workers or room) * self._threads}
            ray.init(address="local", include_dashboard=False, **size, **quiet)
        else:
            self._knock()
            try:
                ray.init(address=self._address, **quiet)
            except (ConnectionError, ImportError, RuntimeError, ValueError) as error:
                raise self._unreachable(error) from error
        self._ours = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Disconnect; end a cluster that was started here."""
        if self._ours:
            _ray().shutdown()
            self._ours = False

    def trainer(self, editor: Editor, load: Load, edits: int, method: str) -> RayTrainer:
        """Workers for an editor; they load the model while the driver plans.

        Args:
            editor: whose edits are to be trained.
            load: makes the editor's model and tokenizer anywhere in the cluster, say
                ``functools.partial(wise_ext.load_model, "org/name")``.
            edits: how many there are; no more workers are made than they have use for.
            method: how they are written.

        Raises:
            ClusterError: there is no room for so many, or for one.
        """
        ray = _ray()
        device = next(editor.model.parameters()).device.type
        there = ray.cluster_resources()
        room = int(there.get("CPU", 0) // self._threads)
        if device == "cuda":
            room = min(room, int(there.get("GPU", 0)))
        wanted = self._workers or room
        if not 1 <= wanted <= room:
            raise ClusterError(
                f"the cluster has room for {room} workers of {self._threads} threads each"
                f"{' and a GPU' if device == 'cuda' else ''}, not for {max(wanted, 1)}: "
                "ask for fewer (--ray-workers), or set OMP_NUM_THREADS to less"
            )
        recipe = Recipe(load, editor.config, editor.anyedit, self._threads, editor.digest())
        actor = ray.remote(EditingWorker).options(
            num_cpus=self._threads,
            num_gpus=1 if device == "cuda" else 0,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        # Guests take room, too; so there may be more parts, but hardly.
        parts = edits if method == ANYEDIT else 1 + -(-edits // editor.config.shard_size)
        return RayTrainer([actor.remote(recipe) for _ in range(min(wanted, max(parts, 1)))])

    def _knock(self) -> None:
        """Ray takes long to find out that nobody is there."""
        host, _, port = str(self._address).removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():
            try:
                socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
            except OSError as error:
                raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ClusterError:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return ClusterError(
            f"no Ray cluster answers at {self._address} ({why}): start one with `ray start "
            "--head`, or give no address to use this machine alone"
        )


class RayTrainer:
    """Trains an editor's steps on workers of a cluster (``Editor.edit(…, trainer=…)``). May be used
    as a context manager, which ends the workers."""

    ahead = True

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = {f"worker {number}": actor for number, actor in enumerate(actors, 1)}
        self._running = {actor.arrive.remote(): name for name, actor in self._actors.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for actor in self._actors.values():
            _ray().kill(actor)

    def train(self, tasks: Iterator[Task], progress: Progress = no_progress) -> Iterator[Trained]:
        """See ``Trainer``. There is no progress to be seen within a step.

        Raises:
            ClusterError: a step's worker died again and again, or is unlike this machine.
            WiseError: what training raised there.
        """
        return in_order(tasks, self, _AHEAD * len(self._actors))

    def start(self, worker: str, task: Task) -> None:
        """Give a worker a step."""
        if task.values is not None:
            # Those of a memory just loaded are part of a file.
            task = task._replace(values=task.values.clone())
        self._running[self._actors[worker].train.remote(task)] = worker

    def wait(self) -> tuple[str, Trained | None]:
        """The worker that is done next, and with what; nothing, if it has but arrived.

        Raises:
            ClusterError, WiseError: see ``train``.
        """
        ray = _ray()
        (done,), _ = ray.wait(list(self._running), num_returns=1)
        worker = self._running.pop(done)
        try:
            return worker, ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ClusterError(
                f"{worker} was lost with a step {1 + _RETRIES} times: see that its machine has "
                f"memory enough, then go on with --resume ({lines[0] if lines else error})"
            ) from error

    def cpu_seconds(self) -> list[float]:
        """The CPU time of each worker so far; those that are loading the model are waited for, and
        those that are training, too."""
        return list(_ray().get([actor.cpu_seconds.remote() for actor in self._actors.values()]))


def edit(
    editor: Editor,
    edits: Sequence[Edit],
    load: Load,
    address: str | None = None,
    workers: int | None = None,
    method: str | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> EditReport:
    """``editor.edit`` with the training done on a Ray cluster; the memory is the same, to the byte.

    Args:
        editor, edits, method, progress: as for ``Editor.edit``.
        load: see ``Cluster.trainer``.
        address, workers: see ``Cluster``.

    Raises:
        ClusterError: the cluster cannot be used.
        WiseError: as ``Editor.edit``.
    """
    how = method or method_for(edits)
    with (
        Cluster(address, workers) as cluster,
        cluster.trainer(editor, load, len(edits), how) as trainer,
    ):
        return editor.edit(edits, progress, how, trainer)


def _ray() -> ModuleType:
    try:
        import_module("ray.exceptions")
        return import_module("ray")
    except ImportError:
        raise ClusterError(
            'editing on several machines needs the package ray: pip install "wise-ext[ray]"'
        ) from None
