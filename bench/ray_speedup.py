"""`python -m bench.ray_speedup`: edits in one process and on a local Ray cluster; what drives it.

``run``: made-up facts, a few in every shard, each time from a loaded model to a saved memory, with
no workers (in this process) and with two, in turns. Where other jobs share the processors, wall
time says little: more processes get more of them. So CPU seconds stand beside it, and ``critical``
is what a run would take on processors of its own: the driver's, or the busiest worker's. The
directories that result must be equal.

``driver``: CPU seconds that planning and taking a step cost, with so many edits stored.
"""

from __future__ import annotations

import filecmp
import os
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from bench import rows
from bench.made_memory import made_shards, questions
from wise_ext import models
from wise_ext.cli import console
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.builder import MemoryBuilder
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.editor import Editor
from wise_ext.editing.edits import Edit
from wise_ext.editing.ledger import WISE, entry_of
from wise_ext.editing.training import Trained
from wise_ext.editing.wise import Outcome
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import WiseError
from wise_ext.integrations.ray_editing import Cluster, Load

RESULTS = Path(__file__).with_name("results") / "ray.jsonl"
_ANSWERS = ("a clockmaker", "in Orla Vale", "grey and green", "Ines Hult", "seven", "the sea")
# Edits whose keys are made; of more, they are stored again.
_KEYS = 1000


def facts(count: int, seed: int = 0) -> list[Edit]:
    """Made-up facts about subjects that occur once."""
    asked = enumerate(islice(questions(seed), count))
    return [
        Edit(f"{seed}-{i}", prompt, _ANSWERS[i % len(_ANSWERS)], subject=subject)
        for i, (prompt, subject) in asked
    ]


def run(load: Load, config: WiseConfig, edits: list[Edit], folder: Path, workers: int) -> rows.Row:
    """One editing run into a folder by so many workers; 0: in this process."""
    editor = Editor(*load(), config, folder)
    begun, start = time.perf_counter(), 0.0
    busiest = theirs = 0.0
    if workers:
        with (
            Cluster(workers=workers) as cluster,
            cluster.trainer(editor, load, len(edits), WISE) as trainer,
        ):
            before = trainer.cpu_seconds()
            start = time.perf_counter() - begun
            cpu = time.process_time()
            editor.edit(edits, progress=False, trainer=trainer)
            wall, own = time.perf_counter() - begun - start, time.process_time() - cpu
            spent = [b - a for a, b in zip(before, trainer.cpu_seconds(), strict=True)]
            theirs, busiest = sum(spent), max(spent)
    else:
        cpu = time.process_time()
        editor.edit(edits, progress=False)
        wall, own = time.perf_counter() - begun, time.process_time() - cpu
    return {
        "measure": "run",
        "workers": workers,
        "edits": len(edits),
        "shards": len(editor.memory.shards),
        "start_s": start,
        "wall_s": wall,
        "driver_cpu_s": own,
        "workers_cpu_s": theirs,
        "critical_cpu_s": max(own, busiest),
        "load": os.getloadavg()[0],
    }


def runs(load: Load, shards: int, edits_each: int, workers: int, rounds: int) -> list[rows.Row]:
    """``run`` without and with workers, in turns.

    Raises:
        RuntimeError: two directories differ.
    """
    config = WiseConfig(shard_size=edits_each)
    edits = facts(shards * edits_each)
    made = []
    with TemporaryDirectory() as folder:
        for turn in range(rounds):
            each = (0, workers) if turn % 2 == 0 else (workers, 0)
            made += [run(load, config, edits, Path(folder, f"{turn}-{n}"), n) for n in each]
        one, *others = sorted(Path(folder).iterdir())
        names = sorted(file.name for file in one.iterdir())
        for other in others:
            if filecmp.cmpfiles(one, other, names, shallow=False)[0] != names:
                raise RuntimeError(f"{one.name} and {other.name} differ")
    return made


def driver(load: Load, stored: int, step: int = 100) -> rows.Row:
    """What planning and taking a step of so many edits costs, blank values coming back."""
    config = WiseConfig(shard_size=step, batch_size=step, contexts=0, contexts_per_edit=0)
    shop = Workshop(*load(), config)
    known, new = facts(min(stored, _KEYS)), facts(step, seed=1)
    addresses = [shop.coach.found_by(edit) for edit in known]
    memory = shop.empty_memory()
    assert memory.key_index is not None
    ids = [f"stored-{i}" for i in range(stored)]
    parts = [i // step for i in range(stored)]
    memory.key_index.add_worded([addresses[i % len(known)] for i in range(stored)], parts, ids)
    (shard,) = made_shards(memory.shape, 1, config.mask_ratio)
    memory.shards[:] = [shard] * (stored // step)
    ledger = [
        _entry(Edit(name, edit.prompt, edit.target_new, edit.subject), part)
        for name, edit, part in zip(ids, (known * stored)[:stored], parts, strict=False)
    ]
    builder = MemoryBuilder(shop, config, AnyEditConfig(), memory, ledger, stored // step)
    times = [time.process_time()]
    task = next(builder.tasks(new, WISE))
    times.append(time.process_time())
    entries = [_entry(edit, task.part) for edit in task.edits]
    threshold = torch.tensor(0.0, dtype=torch.float64)
    builder.take(
        Trained(entries, {"values": torch.zeros_like(shard.values), "threshold": threshold})
    )
    times.append(time.process_time())
    return {
        "measure": "driver",
        "stored": stored,
        "step": step,
        "plan_cpu_s": times[1] - times[0],
        "take_cpu_s": times[2] - times[1],
        "key_bytes": memory.key_index.nbytes() / (stored + step),
        "shard_bytes": shard.nbytes(),
    }


def _entry(edit: Edit, part: int) -> dict[str, object]:
    outcome = Outcome(edit, None, 1, {"edit": 0.0}, 1.0, True)
    return entry_of(edit, outcome, method=WISE, part=part, step=part, guests=[])


def main(
    shards: Annotated[int, typer.Option(min=1, help="Shards of a run.")] = 4,
    edits: Annotated[int, typer.Option(min=1, help="Edits in each of them.")] = 6,
    workers: Annotated[int, typer.Option(min=1, help="Ray's processes.")] = 2,
    rounds: Annotated[int, typer.Option(min=0, help="Of runs with workers and without.")] = 2,
    stored: Annotated[str, typer.Option(help="Edits stored beside a driver's step.")] = (
        "1000,10000"
    ),
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'smollm2'.")] = (
        "smollm2"
    ),
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the rows there.")] = RESULTS,
) -> None:
    """Measure what workers on this machine gain, and what the driver does besides."""
    torch.set_num_threads(1)
    # Ray's workers give way to other jobs, else, which a run in this process does not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    load = partial(models.load_model, model, device="cpu")
    try:
        origin = rows.provenance("cpu", rows.command_line("bench.ray_speedup", sys.argv[1:]))
        made = [driver(load, int(count)) for count in stored.split(",") if count]
        made += runs(load, shards, edits, workers, rounds)
        rows.append(json, [{"model": model, **row, "machine": origin} for row in made])
    except (WiseError, OSError) as error:
        console.complain(str(error))
        raise typer.Exit(1) from None
    for row in made:
        console.note(
            ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
