"""`python -m bench.neighbours`: hard locality, by the addresses alone.

Stores the prompts of edits without training them, and asks for each edit in other words and about
its neighbours: how many of the former are routed in, how many of the latter stay out, at every
radius and lead that is named. ``ours`` are 60 facts of this project whose rephrasings change the
form as often as not, and whose neighbours are other questions about the same subjects; in the other
data sets a neighbour is the record's locality prompt (of ``extra`` another relation of the same
subject, of ``counterfact`` the same relation of another). Some of those ask for the edited fact
itself; they are counted among all neighbours, and left out of ``out_other``.
"""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from bench import lifelong_data, rows
from bench.progress import case_progress
from wise_ext import models
from wise_ext.cli import console
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import DataError, WiseError

RESULTS = Path(__file__).with_name("results") / "neighbours.jsonl"
OURS = Path(__file__).with_name("data") / "relations.jsonl"
DATASETS = ("zsre", "counterfact", "extra", "ours")
_CHUNK = 32


class Neighbourhood(NamedTuple):
    """An edit's prompt and subject, the same question in other words, and other questions; or
    questions that are called so, and ask for the edited fact itself (``mislabelled``)."""

    prompt: str
    subject: str | None
    inside: list[str]
    outside: list[str]
    mislabelled: bool = False


def read(dataset: str, folder: Path, limit: int) -> list[Neighbourhood]:
    """The first ``limit`` edits of a data set that have a rephrasing and a neighbour.

    Raises:
        DataError: there is no such data set, or a file is missing.
    """
    if dataset not in DATASETS:
        raise DataError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    if dataset == "ours":
        lines = [json_format.loads(line) for line in OURS.read_text("utf-8").splitlines()]
        made = [
            Neighbourhood(r["prompt"], r["subject"], r["rephrase"], r["same_subject"])
            for r in lines
        ]
    else:
        edits = lifelong_data.pool(dataset, folder).edits
        same = lifelong_data.asks_the_same(dataset, folder)
        made = [
            Neighbourhood(
                e.prompt, e.subject, [e.rephrase_prompt], [e.locality_prompt], e.prompt in same
            )
            for e in edits
            if e.rephrase_prompt and e.locality_prompt
        ]
    return made[:limit]


def measure(
    shop: Workshop, stored: Sequence[Neighbourhood], radii: Sequence[float], leads: Sequence[float]
) -> list[rows.Row]:
    """For every radius and lead: the shares routed in (to any edit, to the right one) and out (of
    all neighbours, and of those that do ask something else)."""
    index = shop.empty_memory().key_index
    assert index is not None
    keys = [shop.coach.addresses(n.prompt, n.subject) for n in stored]
    places = range(len(stored))
    index.add_worded(keys, places, [str(i) for i in places])
    inside = [(text, i) for i, n in enumerate(stored) for text in n.inside]
    outside = [text for n in stored for text in n.outside]
    other = torch.tensor([not n.mislabelled for n in stored for _ in n.outside], dtype=torch.bool)
    texts = [*(text for text, _ in inside), *outside]
    queries = shop.coach.keys(texts, [None] * len(texts))
    wanted = torch.tensor([i for _, i in inside])
    made = []
    with case_progress() as progress:
        task = progress.add_task("", total=len(radii) * len(leads))
        for radius in radii:
            for lead in leads:
                chunks = [queries[i : i + _CHUNK] for i in range(0, len(queries), _CHUNK)]
                found = torch.cat([index.find(chunk, radius, lead) for chunk in chunks])
                found = torch.where(found < 0, found, index.shards[found])
                ours, theirs = found[: len(inside)], found[len(inside) :]
                made.append(
                    {
                        "radius": radius,
                        "lead": lead,
                        "edits": len(stored),
                        "rephrasings": len(inside),
                        "neighbours": len(outside),
                        "other": int(other.sum()),
                        "in": float((ours >= 0).float().mean()),
                        "right": float((ours == wanted).float().mean()),
                        "out": float((theirs < 0).float().mean()),
                        "out_other": float((theirs[other] < 0).float().mean()),
                    }
                )
                progress.advance(task)
    return made


def main(
    dataset: Annotated[
        list[str], typer.Option(help=f"Repeat for more: {', '.join(DATASETS)}.")
    ] = list(DATASETS),  # noqa: B006 - typer reads it, nobody changes it
    limit: Annotated[int, typer.Option(min=1, help="Edits of each.")] = 300,
    radius: Annotated[
        list[float] | None, typer.Option(help="Repeat for more.  [default's]")
    ] = None,
    lead: Annotated[list[float] | None, typer.Option(help="Repeat for more.  [default's]")] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'smollm2'.")] = (
        "smollm2"
    ),
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="The files' folder.")] = None,
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the rows there.")] = RESULTS,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")] = 1,
) -> None:
    """Measure how many rephrasings are routed in and how many neighbours stay out."""
    torch.set_num_threads(threads)
    config = WiseConfig(contexts=0, contexts_per_edit=0, contexts_per_round=0)
    try:
        folder = lifelong_data.data_folder(data)
        pools = {name: read(name, folder, limit) for name in dataset}
        origin = rows.provenance("cpu", rows.command_line("bench.neighbours", sys.argv[1:]))
        shop = Workshop(*models.load_model(model, device="cpu"), config)
        made = []
        for name, stored in pools.items():
            for row in measure(shop, stored, radius or [config.radius], lead or [config.lead]):
                made.append({"dataset": name, **row, "model": model, "machine": origin})
        rows.append(json, made)
    except (WiseError, OSError) as error:
        console.complain(str(error))
        raise typer.Exit(1) from None
    columns = ("dataset", "radius", "lead", "in", "right", "out", "out_other")
    lines = [(r["dataset"], *(f"{r[name]:.2f}" for name in columns[1:])) for r in made]
    console.table("rephrasings in, neighbours out", columns, lines, right=columns[1:])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
