"""`python -m bench.overhead`: what a patched model costs beside the bare one.

Two model objects share one set of weights, one bare, one patched with a made-up memory
(`bench.made_memory`); they take turns, and what is reported is the median of the paired ratios.
Before any clock, rows that stay in the main memory must give the bare model's logits to the bit,
and the others must go to the shard of their edit.

prefill  a prompt of that many tokens, the last of which ask for a stored edit where it is routed
decode   single tokens behind a prompt of 128
layer    the edited projection alone at another model's shape, the route being known
layer and routing
         the same, and the decision where its unrouted rows go: by keys of that length, of a hundred
         edits a shard, or by indicators a quarter as large as the thresholds, which is what the
         paper's margins (5 and 20) train
"""

from __future__ import annotations

import copy
import json as json_format
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import rows as bench_rows
from bench.cases import SHAPES
from bench.made_memory import Made, Maker
from bench.overhead_case import BEHIND, Case, WrongError, in_pairs, memory_of
from bench.overhead_layer import of_layer
from bench.overhead_peer import PeerAdapters
from bench.overhead_peer import check as peer_answers
from bench.overhead_plot import PEER
from bench.peer_easyedit import PeerError, commit_of
from bench.rows import Row, command_line, homeless, provenance
from wise_ext.cli import console
from wise_ext.editing.prompts import encode_prompt, neutral_prompts
from wise_ext.errors import WiseError
from wise_ext.memory import SideMemory
from wise_ext.models import last_route, load_model, patch, unload
from wise_ext.storage import load_memory_dir, save_memory

RESULTS = Path(__file__).with_name("results") / "overhead.jsonl"
ROUTED = ("none", "half", "all")
ROUTERS = ("key", "indicator")
_COLUMNS = ("what", "router", "shards", "routed", "over bare", "p20-p80", "bare ms")


def main(
    shards: Annotated[list[int] | None, typer.Option(help="Repeat.  [1 6 24 100]")] = None,
    routed: Annotated[list[str] | None, typer.Option(help="Repeat.  [none half all]")] = None,
    prefill: Annotated[list[int] | None, typer.Option(help="Tokens; repeat.  [128 1024]")] = None,
    decode: Annotated[list[int] | None, typer.Option(help="Batches; repeat.  [1 8]")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Shapes; repeat.  [llama-3-8b]")] = None,
    only: Annotated[str, typer.Option(help="model or layer.  [both]")] = "",
    router: Annotated[str, typer.Option(help=f"One of {', '.join(ROUTERS)}.")] = "key",
    pairs: Annotated[int, typer.Option(min=3, help="Timings of each side.")] = 21,
    model: Annotated[str, typer.Option(help="As wise_ext.load_model takes it.")] = "smollm2",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    easyedit: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A clone whose adapter is measured, too.")
    ] = None,
    json: Annotated[Path, typer.Option(metavar="FILE", help="Append the rows there.")] = RESULTS,
) -> None:
    """Prefill, decoding and the layer alone, patched over bare."""
    torch.set_num_threads(threads)
    for given, known in ((routed or [], ROUTED), ([router], ROUTERS), (layer or [], SHAPES)):
        for name in set(given) - set(known):
            console.complain(f"there is no {name!r}: choose from {', '.join(known)}")
            raise typer.Exit(1)
    counts, shares = shards or [1, 6, 24, 100], routed or list(ROUTED)
    found: list[Row] = []
    common = {
        "router": router,
        "pairs": pairs,
        "clock": "process" if threads == 1 else "wall",
        "machine": provenance("cpu", command_line("bench.overhead", sys.argv[1:])),
    }
    try:
        with torch.no_grad():
            if only != "layer":
                cases = [Case("prefill", n, 1, s) for n in prefill or [128, 1024] for s in shares]
                cases += [Case("decode", BEHIND, b, s) for b in decode or [1, 8] for s in shares]
                cases = [c for c in cases if c.batch > 1 or c.routed != "half"]
                for row in of_model(model, router, counts, cases, pairs):
                    found.append({**row, **common})
                    _publish(json, found[-1])
                if easyedit is not None:
                    peers = PeerAdapters(easyedit)
                    for row in of_peer(peers, model, counts, cases, pairs):
                        found.append({**common, **row, "peer": commit_of(easyedit)})
                        _publish(json, found[-1])
            if only != "model":
                for row in of_layer(layer or ["llama-3-8b"], router, counts, shares, pairs):
                    found.append({**row, **common})
                    _publish(json, found[-1])
    except (WiseError, WrongError, PeerError) as error:
        console.complain(str(error))
        raise typer.Exit(1) from error
    right = _COLUMNS[2:]
    console.table("patched over bare", _COLUMNS, map(_cells, found), right=right)


# -- the whole model -------------------------------------------------------------------------------


def of_model(
    name: str, router: str, counts: list[int], cases: list[Case], pairs: int
) -> Iterator[Row]:
    """The rows of every case with memories of so many shards."""
    model, tokenizer = load_model(name, "fp32", "cpu")
    bare = twin(model)
    maker = Maker(model, tokenizer, router)
    for count in counts:
        made = maker.make(count)
        began, before = time.perf_counter(), memory_of("VmRSS")
        patch(model, made.memory)
        loaded = time.perf_counter() - began
        size = {
            "shards": count,
            "edits": len(made.prompts),
            "bank_bytes": made.memory.nbytes(torch.float32),
            "key_bytes": 0 if made.memory.key_index is None else made.memory.key_index.nbytes(),
            "dense_bytes": count * made.memory.shape[0] * made.memory.shape[1] * 4,
            "patch_seconds": loaded,
            "patch_resident": memory_of("VmRSS") - before,
            "load_seconds": load_seconds(made.memory),
            "model": homeless(name),
        }
        for case in cases:
            if router == "indicator" and case.routed != "none":
                continue  # made-up deltas know no edits
            console.note(f"{case.label}, {count} shards, {case.routed} routed")
            ids = asked(model, bare, case, made, tokenizer)
            measured = _prefill if case.phase == "prefill" else _decode
            yield {**vars(case), **size, **measured(model, bare, ids, pairs)}
        unload(model)


def load_seconds(memory: SideMemory) -> float:
    """Seconds that it takes to read a saved memory, the shards of which are mapped."""
    with tempfile.TemporaryDirectory() as folder:
        save_memory(folder, memory, {}, [], {"name": "made", "fingerprint": ""})
        began = time.perf_counter()
        load_memory_dir(folder)
        return time.perf_counter() - began


def of_peer(
    peers: PeerAdapters, name: str, counts: list[int], cases: list[Case], pairs: int
) -> Iterator[Row]:
    """The same with EasyEdit's adapter, which takes one row at a time and decides at every pass."""
    model, tokenizer = load_model(name, "fp32", "cpu")
    bare, layer = twin(model), Maker(model, tokenizer).make(0).memory.layer
    for count in counts:
        for case in cases:
            if case.batch > 1 or case.routed == "half":
                continue
            console.note(f"EasyEdit: {case.label}, {count} memories, {case.routed} routed")
            ids = prompts(replace(case, routed="none"), (), tokenizer)
            with peers.attached(model, layer, count, case.routed == "all"):
                if not peer_answers(model, bare, ids, case.routed == "all"):
                    raise WrongError(f"EasyEdit, {case.label}: went the wrong way")
                measured = _prefill if case.phase == "prefill" else _decode
                size = {"shards": count, "model": homeless(name), "router": PEER}
                yield {**vars(case), **size, **measured(model, bare, ids, pairs)}


def twin(model: Any) -> Any:
    """Another model object with the very same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def asked(model: Any, bare: Any, case: Case, made: Made, tokenizer: Any) -> Tensor:
    """Prompts that go where they should: now and then a made-up name is like the text at hand.

    Raises:
        WrongError: none of some places in the text will do, or a row is answered wrongly.
    """
    for start in range(0, 320, 40):
        ids = prompts(case, made.prompts, tokenizer, start)
        model(input_ids=ids)
        astray = wrong_route(last_route(model), case, made)
        if not astray:
            check(model, bare, ids, case, made)
            return ids
    raise WrongError(astray)


def prompts(case: Case, questions: Sequence[str], tokenizer: Any, start: int = 0) -> Tensor:
    """Token ids [batch, tokens]: neutral text, and at its end, where a row is to be routed, the
    question of a stored edit."""
    filler = encode_prompt(tokenizer, " ".join(neutral_prompts()))
    filler = (filler[start:] + filler[:start]) * -(-(case.tokens + case.batch) // len(filler))
    found = []
    for row, chosen in enumerate(case.shares()):
        asked = []
        if chosen:
            asked = encode_prompt(tokenizer, "\n" + questions[_place(row, len(questions))])
        found.append([*filler[row : row + case.tokens - len(asked)], *asked][-case.tokens :])
    return torch.tensor(found)


def _place(row: int, edits: int) -> int:
    """The edit that a row asks for: all over the memory."""
    return (row * 37 + 11) % edits


def check(model: Any, bare: Any, ids: Tensor, case: Case, made: Made) -> None:
    """Rows go where they should, and those in main memory are the bare model's to the bit.

    Raises:
        WrongError: they do not.
    """
    patched, plain = model(input_ids=ids).logits, bare(input_ids=ids).logits
    astray = wrong_route(last_route(model), case, made)
    if astray:
        raise WrongError(astray)
    for row, chosen in enumerate(case.shares()):
        if not chosen and not torch.equal(patched[row], plain[row]):
            raise WrongError(f"{case.label}: row {row} is not what the bare model says")
        if chosen and torch.equal(patched[row], plain[row]):
            raise WrongError(f"{case.label}: row {row} is what the bare model says")


def wrong_route(routes: Tensor | None, case: Case, made: Made) -> str:
    """Which row went elsewhere than it should, if any."""
    for row, chosen in enumerate(case.shares()):
        edit = f"made-{_place(row, len(made.prompts))}"
        wanted = made.memory.shard_of(edit) if chosen else -1
        if routes is None or int(routes[row]) != wanted:
            went = "nowhere" if routes is None else int(routes[row])
            return f"{case.label}: row {row} went to {went}, not {wanted}"
    return ""


def _prefill(model: Any, bare: Any, ids: Tensor, pairs: int) -> Row:
    def of(one: Any) -> Callable[[], Any]:
        return lambda: one(input_ids=ids, use_cache=True, logits_to_keep=1)

    return in_pairs(of(model), of(bare), pairs)


def _decode(model: Any, bare: Any, ids: Tensor, pairs: int) -> Row:
    """Both write on behind the same prompt, in turns."""

    def of(one: Any) -> Callable[[], Any]:
        cache = one(input_ids=ids, use_cache=True).past_key_values
        token = ids[:, -1:]
        return lambda: one(input_ids=token, past_key_values=cache, use_cache=True)

    # A token is soon written: more of them for a steady median.
    return in_pairs(of(model), of(bare), 4 * pairs)


def _publish(file: Path, row: Row) -> None:
    bench_rows.append(file, [row])
    console.note(json_format.dumps({n: row[n] for n in ("ratio", "ratio_low", "ratio_high")}))


def _cells(row: Row) -> list[object]:
    spread = f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}"
    what = f"{row['phase']} {row['tokens']} x {row['batch']}"
    return [
        f"{what} ({row['model']})",
        row["router"],
        row["shards"],
        row["routed"],
        f"{row['ratio']:.3f}",
        spread,
        f"{row['bare_ms']:.2f}",
    ]


if __name__ == "__main__":
    typer.run(main)
