"""`python -m bench.passages FILE`: what long answers cost beyond their edits, and who finds them.

``routing`` stores the questions of the first records of a file without writing their answers, and
asks the same in other words, the questions of further records, and unrelated ones; names found in
the questions, and none. ``reading`` evaluates edited records with expected answers read in one
pass and written token by token, in turns. ``memory`` is by how much a process has grown at its peak
once an answer of so many tokens is written, each in a process of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from bench import rows
from bench.overhead_case import memory_of
from wise_ext import models
from wise_ext.cli import console
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.corpus import default_corpus
from wise_ext.editing.editor import Editor
from wise_ext.editing.edits import Edit, read_edits
from wise_ext.editing.naming import named_in
from wise_ext.editing.prompts import encode_target
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import WiseError
from wise_ext.evaluation import evaluate_long
from wise_ext.evaluation.long_answers import unrelated_prompts

RESULTS = Path(__file__).with_name("results") / "passages.jsonl"
_CHUNK = 32
#: Tokens of the answers whose memory is measured, the first for comparison.
LENGTHS = (128, 512, 1500)


def routing(shop: Workshop, edits: Sequence[Edit], stored: int) -> list[rows.Row]:
    """Shares of questions that reach the right shard, with names and without; how many of those
    that no stored record is about reach any."""
    known, others = edits[:stored], edits[stored:]
    own = [(edit.prompt, i) for i, edit in enumerate(known)]
    reworded = [(str(e.rephrase_prompt), i) for i, e in enumerate(known) if e.rephrase_prompt]
    foreign = [text for e in others for text in (e.prompt, e.rephrase_prompt) if text]
    unrelated = list(unrelated_prompts())
    asked = [*(text for text, _ in chain(own, reworded)), *foreign, *unrelated]
    queries = list(
        chain.from_iterable(
            shop.coach.keys(asked[i : i + _CHUNK], [None] * len(asked[i : i + _CHUNK]))
            for i in range(0, len(asked), _CHUNK)
        )
    )
    wanted = torch.tensor([i for _, i in chain(own, reworded)])
    config = WiseConfig()
    made = []
    for names in (True, False):
        index = shop.empty_memory().key_index
        assert index is not None
        found_names = [e.subject or (named_in(e.prompt) if names else None) for e in known]
        keys = [
            shop.coach.addresses(e.prompt, name) for e, name in zip(known, found_names, strict=True)
        ]
        index.add_worded(keys, range(len(known)), [str(i) for i in range(len(known))])
        chunks = [queries[i : i + _CHUNK] for i in range(0, len(queries), _CHUNK)]
        found = torch.cat([index.find(chunk, config.radius, config.lead) for chunk in chunks])
        found = torch.where(found < 0, found, index.shards[found])
        right = found[: len(wanted)] == wanted
        elsewhere = found[len(wanted) :] >= 0
        made.append(
            {
                "measure": "routing",
                "names": names,
                "stored": len(known),
                "named": sum(name is not None for name in found_names) / len(known),
                "own": float(right[: len(own)].float().mean()),
                "reworded": float(right[len(own) :].float().mean()) if reworded else None,
                "foreign": len(foreign),
                "foreign_to_side": int(elsewhere[: len(foreign)].sum()),
                "unrelated": len(unrelated),
                "unrelated_to_side": int(elsewhere[len(foreign) :].sum()),
            }
        )
    return made


def reading(model: Any, tokenizer: Any, edits: Sequence[Edit], rounds: int) -> list[rows.Row]:
    """CPU seconds of evaluations that read and that write, their order turning.

    Raises:
        RuntimeError: the two report differently.
    """
    editor = Editor(model, tokenizer, WiseConfig())
    editor.edit(edits, progress=False, method="anyedit")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    reports: dict[bool, Any] = {}
    for turn in range(rounds):
        for one_pass in (turn % 2 == 0, turn % 2 == 1):
            start = time.process_time()
            report = evaluate_long(
                model,
                tokenizer,
                edits,
                one_pass=one_pass,
                similarity=False,
                unedited=False,
                unrelated=[],
                progress=False,
            )
            seconds[one_pass].append(time.process_time() - start)
            reports[one_pass] = {k: v for k, v in report.items() if k != "seconds"}
    editor.reset()
    if reports[True] != reports[False]:
        raise RuntimeError("an evaluation that reads reports other figures than one that writes")
    read, written = (median(seconds[one_pass]) for one_pass in (True, False))
    figures = {"read_cpu_s": read, "written_cpu_s": written, "ratio": read / written}
    return [{"measure": "reading", "edits": len(edits), "rounds": rounds, **figures}]


def growth(model: str, tokens: int) -> float:
    """MiB by which this process's peak grows while an answer of so many tokens is written."""
    torch.set_num_threads(1)
    network, tokenizer = models.load_model(model, device="cpu")
    text = " ".join(default_corpus())
    ids = encode_target(tokenizer, text[: tokens * 12], stop=False)[:tokens]
    answer = str(tokenizer.decode(ids))
    editor = Editor(network, tokenizer, WiseConfig())
    warm = Edit("warm", "What does the mill of Ardo say?", "It says nothing.")
    editor.edit([warm], progress=False, method="anyedit")
    before = memory_of("VmHWM")
    edit = Edit("long", "What does the book of Lumo Vale say?", answer)
    editor.edit([edit], progress=False, method="anyedit")
    return (memory_of("VmHWM") - before) / 2**20


def memory(model: str, lengths: Sequence[int] = LENGTHS) -> list[rows.Row]:
    """``growth`` at every length, each in a fresh process."""
    made = []
    for tokens in lengths:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            grown = pool.submit(growth, model, tokens).result()
        made.append({"measure": "memory", "tokens": tokens, "grown_mib": grown})
    return made


def main(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Long-form records.")],
    stored: Annotated[int, typer.Option(min=1, help="Records whose questions are stored.")] = 300,
    read: Annotated[int, typer.Option(min=0, help="Records to edit and evaluate; 0: none.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Of reading and of writing.")] = 3,
    grow: Annotated[bool, typer.Option(help="Measure memory, too.")] = True,
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'smollm2'.")] = (
        "smollm2"
    ),
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the rows there.")] = RESULTS,
) -> None:
    """Measure who finds long answers, and what measuring and writing them costs."""
    torch.set_num_threads(1)
    try:
        seen: dict[str, Edit] = {edit.prompt: edit for edit in read_edits(file)}
        edits = list(seen.values())
        origin = rows.provenance("cpu", rows.command_line("bench.passages", sys.argv[1:]))
        network, tokenizer = models.load_model(model, device="cpu")
        config = WiseConfig(contexts=0, contexts_per_edit=0, contexts_per_round=0)
        made = routing(Workshop(network, tokenizer, config), edits, stored)
        made += reading(network, tokenizer, edits[:read], rounds) if read else []
        made += memory(model) if grow else []
        named = [{"file": file.name, "model": model, **row, "machine": origin} for row in made]
        rows.append(json, named)
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
