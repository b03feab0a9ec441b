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
import gc
import json as json_format
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench import rows as bench_rows
from bench.cases import SHAPES
from bench.made_memory import Made, Maker, made_index, made_shards
from bench.rows import Row, command_line, homeless, provenance
from bench.timing import percentile
from wise_ext.cli import console
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.prompts import encode_prompt, neutral_prompts
from wise_ext.errors import WiseError
from wise_ext.memory import IndicatorRouter, KeyRouter, PackedBank, Router, uncued
from wise_ext.models import last_route, load_model, patch, unload
from wise_ext.nn import Course, DualLinear, RouteState

RESULTS = Path(__file__).with_name("results") / "overhead.jsonl"
ROUTED = ("none", "half", "all")
ROUTERS = ("key", "indicator")
#: tokens of the prompt before those that are decoded
BEHIND = 128
_COLUMNS = ("what", "router", "shards", "routed", "over bare", "p20-p80", "bare ms")


class WrongError(Exception):
    """What is about to be timed does not do what it should."""


@dataclass(frozen=True)
class Case:
    """One line of the bench.

    Attributes:
        phase: "prefill", "decode", "layer" or "layer and routing".
        tokens: of the prompt, or rows of the layer's input.
        batch: rows of the batch.
        routed: "none", "half" or "all" of these rows go to a shard.
    """

    phase: str
    tokens: int
    batch: int
    routed: str

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.phase} {self.tokens} x {self.batch}"

    def shares(self) -> list[bool]:
        """Which rows of the batch are to be routed."""
        every = {"none": 0, "half": 2, "all": 1}[self.routed]
        return [bool(every) and row % every == 0 for row in range(self.batch)]


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
            if only != "model":
                for row in of_layer(layer or ["llama-3-8b"], router, counts, shares, pairs):
                    found.append({**row, **common})
                    _publish(json, found[-1])
    except (WiseError, WrongError) as error:
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
        began, before = time.perf_counter(), _resident()
        patch(model, made.memory)
        loaded = time.perf_counter() - began
        size = {
            "shards": count,
            "edits": len(made.prompts),
            "bank_bytes": made.memory.nbytes(torch.float32),
            "key_bytes": 0 if made.memory.key_index is None else made.memory.key_index.nbytes(),
            "dense_bytes": count * made.memory.shape[0] * made.memory.shape[1] * 4,
            "patch_seconds": loaded,
            "patch_resident": _resident() - before,
            "model": homeless(name),
        }
        for case in cases:
            if router == "indicator" and case.routed != "none":
                continue  # made-up deltas know no edits
            console.note(f"{case.label}, {count} shards, {case.routed} routed")
            ids = prompts(case, made, tokenizer)
            check(model, bare, ids, case, made)
            measured = _prefill if case.phase == "prefill" else _decode
            yield {**vars(case), **size, **measured(model, bare, ids, pairs)}
        unload(model)


def twin(model: Any) -> Any:
    """Another model object with the very same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def prompts(case: Case, made: Made, tokenizer: Any) -> Tensor:
    """Token ids [batch, tokens]: neutral text, and at its end, where a row is to be routed, the
    question of a stored edit."""
    filler = encode_prompt(tokenizer, " ".join(neutral_prompts()))
    filler *= -(-case.tokens // len(filler))
    found = []
    for row, chosen in enumerate(case.shares()):
        asked = encode_prompt(tokenizer, "\n" + made.prompts[_place(row, made)]) if chosen else []
        found.append([*filler[row : row + case.tokens - len(asked)], *asked][-case.tokens :])
    return torch.tensor(found)


def _place(row: int, made: Made) -> int:
    """The edit that a row asks for: all over the memory."""
    return (row * 37 + 11) % len(made.prompts)


def check(model: Any, bare: Any, ids: Tensor, case: Case, made: Made) -> None:
    """Rows go where they should, and those in main memory are the bare model's to the bit.

    Raises:
        WrongError: they do not.
    """
    patched, plain = model(input_ids=ids).logits, bare(input_ids=ids).logits
    routes = last_route(model)
    assert routes is not None
    for row, chosen in enumerate(case.shares()):
        edit = f"made-{_place(row, made)}"
        wanted = made.memory.shard_of(edit) if chosen else -1
        if int(routes[row]) != wanted:
            raise WrongError(f"{case.label}: row {row} went to {int(routes[row])}, not {wanted}")
        if not chosen and not torch.equal(patched[row], plain[row]):
            raise WrongError(f"{case.label}: row {row} is not what the bare model says")
        if chosen and torch.equal(patched[row], plain[row]):
            raise WrongError(f"{case.label}: row {row} is what the bare model says")


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


# -- the layer alone -------------------------------------------------------------------------------


def of_layer(
    shapes: list[str], router: str, counts: list[int], shares: list[str], pairs: int
) -> Iterator[Row]:
    """The edited projection alone, 128 tokens and one, random activations."""
    for shape in shapes:
        size = SHAPES[shape]
        base = torch.nn.Linear(size[1], size[0], bias=False)
        for count in counts:
            bank = PackedBank.from_shards(made_shards(size, count, 0.2), size)
            decides = deciding(router, bank)
            cases = [Case("layer", tokens, 1, share) for tokens in (BEHIND, 1) for share in shares]
            cases = [case for case in cases if case.routed != "half" or case.tokens > 1]
            if router == "indicator":
                cases = []  # a known route costs the same, whoever knows it
            cases += [Case("layer and routing", BEHIND, 1, "none")] * ("none" in shares)
            for case in cases:
                console.note(f"{case.label} of {shape}, {count} shards, {case.routed} routed")
                row = _layer(base, bank, decides, case, pairs)
                bytes_ = {
                    "bank_bytes": bank.nbytes,
                    "dense_bytes": count * 4 * size[0] * size[1],
                }
                yield {**vars(case), "shards": count, "model": shape, **bytes_, **row}
            del bank, decides
            gc.collect()


def activations(tokens: int, width: int) -> Tensor:
    """Random ones, fp32 [tokens, width]."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


def deciding(router: str, bank: PackedBank) -> Router:
    """A router for the bank, to which none of `activations` belongs."""
    d_in = bank.shape[1]
    if router == "key":
        return KeyRouter("", made_index(d_in, 100 * bank.num_shards), WiseConfig().radius)
    real = torch.ones(1, BEHIND, dtype=torch.bool)
    open_ = IndicatorRouter("", bank, [0.0] * bank.num_shards, estimate=False)
    typical = open_.indicators(activations(BEHIND, d_in).unsqueeze(0), real)
    return IndicatorRouter("", bank, (4 * typical[0]).tolist())


def _layer(base: torch.nn.Linear, bank: PackedBank, decides: Router, case: Case, pairs: int) -> Row:
    state = RouteState()
    dual = DualLinear(base, bank, state)
    x = activations(case.tokens, base.in_features)
    # Every token a row of its own, so that half of them can be routed.
    every = {"none": 0, "half": 2, "all": 1}[case.routed]
    route = [n % bank.num_shards if every and n % every == 0 else -1 for n in range(case.tokens)]
    state.settle(Course(uncued(torch.tensor(route, dtype=torch.int32)), None))
    real = torch.ones(1, case.tokens, dtype=torch.bool)

    def patched() -> Tensor:
        if case.phase == "layer and routing":
            decides.decide(x.unsqueeze(0), real)
        y: Tensor = dual(x)
        return y

    if int(decides.decide(x.unsqueeze(0), real).route) != -1:
        raise WrongError(f"{case.label}: the prompt went to the side memory")
    stays = torch.tensor(route) < 0
    if not torch.equal(patched()[stays], base(x)[stays]):
        raise WrongError(f"{case.label}: rows that stay in main memory differ")
    return in_pairs(patched, lambda: base(x), pairs)


# -- clocks ----------------------------------------------------------------------------------------


def in_pairs(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> Row:
    """Both, in turns; the median of the ratios, and between what the middle three fifths lie."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    spent: dict[bool, list[float]] = {True: [], False: []}
    gc.collect()
    for number in range(pairs + 1):  # the first pair warms up
        for first in (True, False) if number % 2 else (False, True):
            began = now()
            (one if first else other)()
            if number:
                spent[first].append(now() - began)
    ratios = [a / b for a, b in zip(spent[True], spent[False], strict=True)]
    return {
        "ratio": percentile(ratios, 0.5),
        "ratio_low": percentile(ratios, 0.2),
        "ratio_high": percentile(ratios, 0.8),
        "bare_ms": percentile(spent[False], 0.5) * 1e3,
    }


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        text = Path("/proc/self/statm").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(text.split()[1]) * 4096


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
