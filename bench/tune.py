"""Measure launch configs on this machine's GPU and rewrite its table in kernels/triton/tables.

python -m bench.tune                                          every op, dtype and number of rows
python -m bench.tune --op side_norm --dtype bf16 --rows 64    one of them

A search starts from the configs that the table has and goes on from the best one to its
neighbours. A candidate is compiled and looked into before it is run (what spills or misses the
tensor cores is no candidate), and its results are compared with the reference before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench import triton_resources as resources
from bench.cases import SHAPES, Case
from bench.inputs import Inputs
from bench.registry import Candidate, Mismatch
from bench.rows import provenance
from bench.timing import measure
from bench.tune_jobs import JOBS, Call, Range, verify
from wise_ext.triton_kernels import configs
from wise_ext.triton_kernels.configs import Config

ROWS = (1, 16, 64, 256, 1024, 4096)
WARPS, STAGES = (1, 8), (1, 5)


def neighbours(config: Config, limits: dict[str, Range]) -> list[Config]:
    """Every config one step away: a block or the warps halved or doubled, a stage more or less."""
    found = []
    for name, size in config.blocks.items():
        low, high = limits[name]
        for other in (size // 2, size * 2):
            if low <= other <= high:
                blocks = MappingProxyType({**config.blocks, name: other})
                found.append(replace(config, blocks=blocks))
    for warps in (config.num_warps // 2, config.num_warps * 2):
        if WARPS[0] <= warps <= WARPS[1]:
            found.append(replace(config, num_warps=warps))
    for stages in (config.num_stages - 1, config.num_stages + 1):
        if STAGES[0] <= stages <= STAGES[1]:
            found.append(replace(config, num_stages=stages))
    return found


def search(
    start: Sequence[Config],
    limits: dict[str, Range],
    time: Callable[[list[Config]], dict[Config, float]],
    rounds: int,
) -> tuple[Config, float]:
    """The fastest config found, and its seconds. `time` leaves out what is no candidate."""
    known = time(list(start))
    seen = list(start)
    if not known:
        raise ValueError("none of the table's own configs can be launched")
    for _ in range(rounds):
        best = min(known, key=known.__getitem__)
        fresh = [config for config in neighbours(best, limits) if config not in seen]
        seen += fresh
        known |= time(fresh) if fresh else {}
        if min(known, key=known.__getitem__) == best:
            break
    best = min(known, key=known.__getitem__)
    return best, known[best]


def entries(best: Sequence[tuple[int, Config]]) -> list[dict[str, Any]]:
    """Table entries for the best config at rising numbers of rows: each serves up to its own."""
    found: list[dict[str, Any]] = []
    for rows, config in best:
        entry = {
            "max_rows": rows,
            "blocks": dict(config.blocks),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        if found and {**found[-1], "max_rows": rows} == entry:
            found.pop()
        found.append(entry)
    found[-1]["max_rows"] = None
    return found


def merge(
    table: dict[str, Any], op: str, key: str, found: list[dict[str, Any]], origin: dict[str, Any]
) -> dict[str, Any]:
    """The table with one op's entries of one dtype replaced, and where they are from noted."""
    before = table["provenance"]
    return {
        "provenance": {
            "note": before["note"],
            "measured": {**before["measured"], f"{op} {key}": origin},
        },
        "ops": {**table["ops"], op: {**table["ops"][op], key: found}},
    }


def render(table: dict[str, Any]) -> str:
    """A table as its file has it: one entry a line, so that a change shows as what it is."""
    origin = table["provenance"]
    measured = _lines(
        (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in origin["measured"].items()), 6
    )
    ops = []
    for op, dtypes in table["ops"].items():
        keys = (
            f'"{key}": [{_lines((json.dumps(entry) for entry in found), 8)}]'
            for key, found in dtypes.items()
        )
        ops.append(f'"{op}": {{{_lines(keys, 6)}}}')
    return (
        '{\n  "provenance": {\n'
        f'    "note": {json.dumps(origin["note"])},\n    "measured": {{{measured}}}\n  }},\n'
        f'  "ops": {{{_lines(ops, 4)}}}\n}}\n'
    )


def _lines(items: Iterator[str] | list[str], indent: int) -> str:
    space = "\n" + " " * indent
    inside = f",{space}".join(items)
    return f"{space}{inside}\n{' ' * (indent - 2)}" if inside else ""


@contextmanager
def forced(op: str, config: Config) -> Iterator[None]:
    """Launches of `op` take `config`, whatever the table says."""
    pick = configs.pick

    def instead(asked: str, key: str, rows: int, device: torch.device) -> Config:
        return config if asked == op else pick(asked, key, rows, device)

    configs.pick = instead
    try:
        yield
    finally:
        configs.pick = pick


class Tuner:
    """Times configs of one op with rows of one dtype on the GPU."""

    def __init__(self, op: str, key: str, rows: int, shape: str, seconds: float) -> None:
        self._op, self._key, self._seconds = op, key, seconds
        self._job = JOBS[op]
        self._inputs = Inputs(Case(op, shape, rows, 1, key), "cuda")
        self._wanted = self._job.expected(self._copies())
        self._arch = int(_table_here().removeprefix("sm"))
        # Not the small kernels beside an op's own, nor its mixed dtypes: other configs are theirs.
        own = configs.every(op, key, self._arch)
        self._variants = [
            variant
            for variant in resources.variants(self._arch)
            if variant.name.startswith(op)
            and resources.dtype(variant) == key
            and variant.config in own
        ]

    def _copies(self) -> Inputs:
        return self._inputs.with_copies(self._job.changed)

    def time(self, candidates: list[Config]) -> dict[Config, float]:
        """Median seconds of those that compile well and compute the right thing."""
        fit = {str(index): config for index, config in enumerate(candidates) if self._fits(config)}
        timed = [
            Candidate(name, self._call(config), "auto", capturable=True, grad=False)
            for name, config in fit.items()
        ]
        if not timed:
            return {}
        samples = measure(timed, "cuda", self._seconds)
        return {config: samples[name].percentile(0.5) for name, config in fit.items()}

    def _call(self, config: Config) -> Call:
        launch = self._job.launch(self._copies())

        def call() -> tuple[Tensor, ...]:
            with forced(self._op, config):
                return launch()

        return call

    def _fits(self, config: Config) -> bool:
        try:
            changed = (replace(variant, config=config) for variant in self._variants)
            for variant in {resources.label(each): each for each in changed}.values():
                reason = resources.complaint(variant, self._arch)
                if reason:
                    return self._left_out(config, reason)
            found = self._call(config)()
            torch.cuda.synchronize()
        except Mismatch:
            raise
        except Exception as error:  # the compiler's and the launcher's have no common base
            return self._left_out(config, str(error).splitlines()[0] if str(error) else repr(error))
        verify(self._op, self._key, found, self._wanted)
        return True

    def _left_out(self, config: Config, reason: str) -> bool:
        print(f"  left out {describe(config)}: {reason}", file=sys.stderr)
        return False


def describe(config: Config) -> str:
    """A config in a few words."""
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}={n}" for name, n in config.blocks.items())
    return f"{blocks} warps={config.num_warps} stages={config.num_stages}"


def _table_here() -> str:
    name: str = configs.architecture(torch.cuda.get_device_capability())
    return name


def tune(op: str, key: str, arguments: argparse.Namespace) -> None:
    """Search every number of rows of one op and dtype, and rewrite its part of the table."""
    path: Path = arguments.table or configs.TABLES / f"{_table_here()}.json"
    best, medians = [], {}
    for rows in sorted(set(arguments.rows)) if JOBS[op].by_rows else [1]:
        start = configs.every(op, key, _table_here())
        tuner = Tuner(op, key, rows, arguments.shape, arguments.seconds)
        config, seconds = search(start, JOBS[op].limits, tuner.time, arguments.rounds)
        print(f"{op} {key} N={rows}: {seconds * 1e6:.1f} us with {describe(config)}", flush=True)
        best.append((rows, config))
        medians[str(rows)] = round(seconds * 1e6, 2)
    where = provenance("cuda", shlex.join(["python", "-m", "bench.tune", *sys.argv[1:]]))
    keep = ("gpu", "driver", "cuda", "torch", "triton", "commit", "command", "time")
    origin = {name: where[name] for name in keep} | {"shape": arguments.shape, "median_us": medians}
    table = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(render(merge(table, op, key, entries(best), origin)), encoding="utf-8")


def main() -> None:
    """Tune what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=JOBS, action="append")
    parser.add_argument("--dtype", choices=configs.DTYPE_KEYS.values(), action="append")
    parser.add_argument("--rows", type=int, action="append", default=None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--rounds", type=int, default=4, help="steps of a search at most")
    parser.add_argument("--seconds", type=float, default=0.2, help="measured for each candidate")
    parser.add_argument("--table", type=Path, help="the file to rewrite, if not this GPU's own")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or list(ROWS)
    if not torch.cuda.is_available():
        sys.exit("bench.tune measures on a GPU, and torch sees none here")
    if configs.INTERPRETED:
        sys.exit("unset TRITON_INTERPRET: the interpreter is not to be timed")
    if min(arguments.rows) < 1 or not math.isfinite(arguments.seconds):
        sys.exit("--rows must be at least 1, --seconds a number")
    for op in arguments.op or JOBS:
        keys = configs.DTYPE_KEYS.values() if JOBS[op].by_rows else ("fp32",)
        for key in keys:
            if arguments.dtype is None or key in arguments.dtype:
                tune(op, key, arguments)


if __name__ == "__main__":
    main()
