"""`python -m bench.estimates --memory DIR`: the indicator router with estimates and without.

Prompts are those of the data files (edits, rephrasings, unrelated ones) and pieces of text that the
model writes. Every one is routed twice by a memory whose edits were trained for the indicator; the
routes must be the same, and the row says which share of the norms had to be worked out, and what
either took.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import lifelong_data
from bench import rows as bench_rows
from bench.progress import case_progress
from bench.rows import Row, command_line, homeless, provenance
from wise_ext.cli import console
from wise_ext.editing.anatomy import run_until_stopped, watch
from wise_ext.editing.contexts import sample_contexts
from wise_ext.editing.prompts import encode_prompt
from wise_ext.errors import DataError, WiseError
from wise_ext.memory import IndicatorRouter, PackedBank
from wise_ext.memory.estimates import LEVELS
from wise_ext.models import get_module, load_model
from wise_ext.storage import load_memory_dir

RESULTS = Path(__file__).with_name("results") / "estimates.jsonl"
_CHUNK = 16
_LONGEST = 64
#: pieces that are cut out of a text the model wrote
_PIECES = 20


def main(
    memory: Annotated[Path, typer.Option(help="Of --router indicator.")],
    dataset: Annotated[str, typer.Option(help="Whose prompts.")] = "zsre+counterfact",
    data: Annotated[Path | None, typer.Option(help="Folder of its files.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="So many, a fifth of them written.")] = 10_000,
    model: Annotated[str, typer.Option(help="As wise_ext.load_model takes it.")] = "smollm2",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the row there.")] = RESULTS,
) -> None:
    """Route many prompts with and without estimates."""
    torch.set_num_threads(threads)
    try:
        stored = load_memory_dir(memory).memory
        if stored.routing != "indicator":
            raise DataError(f"{memory} routes by {stored.routing}: give one of --router indicator")
        network, tokenizer = load_model(model, "fp32", "cpu")
        asked = asked_by(dataset, lifelong_data.data_folder(data))[: prompts - prompts // 5]
        texts = [encode_prompt(tokenizer, text)[-_LONGEST:] for text in asked]
        texts += written(network, tokenizer, prompts - len(texts))
        bank, thresholds = stored.bank(), [shard.threshold for shard in stored.shards]
        assert isinstance(bank, PackedBank)  # the indicator routes between no others
        routers = {
            name: IndicatorRouter(stored.layer, bank, thresholds, estimate=name == "on")
            for name in ("off", "on")
        }
        row = compared(network, stored.layer, routers, texts)
    except WiseError as error:
        console.complain(str(error))
        raise typer.Exit(1) from error
    row |= {
        "estimates": list(LEVELS),
        "dataset": dataset,
        "written": len(texts) - len(asked),
        "shards": len(stored.shards),
        "edits": len(stored.edit_ids),
        "model": homeless(model),
        "machine": provenance("cpu", command_line("bench.estimates", sys.argv[1:])),
    }
    bench_rows.append(json, [row])
    shown = {name: value for name, value in row.items() if name != "machine"}
    console.table("routes with estimates and without", ("what", "value"), shown.items())
    if row["same"] < row["prompts"]:
        raise typer.Exit(1)


def asked_by(dataset: str, folder: Path) -> list[str]:
    """Every prompt of a data set's records."""
    edits = lifelong_data.pool(dataset, folder).edits
    fields = ((e.prompt, e.rephrase_prompt, e.locality_prompt) for e in edits)
    return [text for some in fields for text in some if text]


def written(model: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """Pieces of texts of the model's own, of all lengths, as token ids."""
    draw, found = random.Random(0), []
    texts = sample_contexts(model, tokenizer, -(-count // _PIECES), _LONGEST, seed=0)
    for text in texts:
        ids = encode_prompt(tokenizer, text)
        for _ in range(_PIECES):
            length = draw.randint(1, len(ids))
            start = draw.randint(0, len(ids) - length)
            found.append(ids[start : start + length])
    return found[:count]


def compared(
    model: Any, layer: str, routers: dict[str, IndicatorRouter], texts: list[list[int]]
) -> Row:
    """How many routes are the same, how many norms were worked out, and seconds of either."""
    same, side, seconds = 0, 0, dict.fromkeys(routers, 0.0)
    with case_progress() as bar:
        task = bar.add_task("prompts", total=len(texts))
        for number, (a, real) in enumerate(activations(model, layer, texts)):
            routes = {}
            # in turns, so that neither is always the one that finds the activations cold
            for name in sorted(routers, reverse=bool(number % 2)):
                began = time.process_time()
                routes[name] = routers[name].decide(a, real).route
                seconds[name] += time.process_time() - began
            same += int((routes["on"] == routes["off"]).sum())
            side += int((routes["off"] >= 0).sum())
            bar.advance(task, len(a))
    on = routers["on"]
    return {
        "prompts": len(texts),
        "same": same,
        "to_side": side / len(texts),
        "exact_share": on.exact / max(on.pairs, 1),
        "seconds_on": seconds["on"],
        "seconds_off": seconds["off"],
    }


@torch.no_grad()
def activations(model: Any, layer: str, texts: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """What enters a layer, [B, T, d_in], and which tokens are real: texts of about one length
    together, pads behind."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    seen: dict[str, Tensor] = {}
    with watch(get_module(model, layer), "a", seen, entering=True, stop=True):
        for start in range(0, len(order), _CHUNK):
            rows = [texts[place] for place in order[start : start + _CHUNK]]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            real = torch.zeros(ids.shape, dtype=torch.bool)
            for row, text in enumerate(rows):
                ids[row, : len(text)] = torch.tensor(text)
                real[row, : len(text)] = True
            run_until_stopped(model, ids)
            yield seen["a"].view(*ids.shape, -1), real


if __name__ == "__main__":
    typer.run(main)
