"""`python -m bench.goals FILE.jsonl`: what was aimed at, what the rows say, met or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from bench import rows as bench_rows
from bench.cases import DISPATCH_SHAPE, MERGED_DELTAS, Case
from bench.registry import COMPOSITES
from bench.rows import Row
from bench.work import FP32, ties_merge_moved
from wise_ext.cli import console

OURS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Verdict:
    """One goal on one case.

    Attributes:
        measured: the figure the limit is for; None where rows are missing.
        provider: whose figure it is, the best of ours.
    """

    goal: str
    case: str
    limit: float
    at_most: bool
    measured: float | None = None
    provider: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


class Rows:
    """Rows of one device by case and provider; of several the last counts."""

    def __init__(self, rows: Iterable[Row], device: str) -> None:
        self._found = {
            (Case.from_json(row), row["provider"]): row
            for row in rows
            if row["machine"]["device"] == device
        }
        self.device = device

    def cases(self, op: str, rows: Sequence[int], variant: str = "") -> Iterator[Case]:
        """The cases of an op with one shard (or its fixed number) that were measured."""
        seen = dict.fromkeys(case for case, _ in self._found)
        for case in seen:
            asked = case.op == op and case.rows in rows and case.variant == variant
            if asked and case.shards in (1, MERGED_DELTAS) and case.shape != DISPATCH_SHAPE:
                yield case

    def best(self, case: Case, providers: Iterable[str]) -> Row | None:
        """The fastest row of some providers."""
        found = [self._found[case, name] for name in providers if (case, name) in self._found]
        return min(found, key=lambda row: float(row["p50_us"]), default=None)


def _linear_of(case: Case) -> Case:
    return replace(case, op="linear", variant="", shards=1)


def _against_linear(rows: Rows, case: Case) -> tuple[float, str] | None:
    """Our time over that of the plain linear; of one row on the CPU, over the better of two."""
    ours = rows.best(case, OURS[rows.device])
    dense = [rows.best(_linear_of(case), ("torch",))]
    if rows.device == "cpu":
        dense.append(rows.best(replace(_linear_of(case), op="mv"), ("torch",)))
    times = [row["p50_us"] for row in dense if row]
    if ours is None or len(times) < len(dense):
        return None
    return ours["p50_us"] / min(times), ours["provider"]


def _against_composite(rows: Rows, case: Case) -> tuple[float, str] | None:
    """How many times faster than the fastest composite that was measured."""
    ours, theirs = rows.best(case, OURS[rows.device]), rows.best(case, COMPOSITES)
    if ours is None or theirs is None:
        return None
    return theirs["p50_us"] / ours["p50_us"], f"{ours['provider']} against {theirs['provider']}"


def _memory(rows: Rows, case: Case) -> tuple[float, str] | None:
    """Memory of a call in matrices of the result's size, the result included."""
    ours = rows.best(case, OURS[rows.device])
    if ours is None or ours["extra_bytes"] is None:
        return None
    return ours["extra_bytes"] / (case.d_out * case.d_in * FP32), ours["provider"]


def _bandwidth(rows: Rows, case: Case) -> tuple[float, str] | None:
    """Bytes that the algorithm moves a second, over those of a copy."""
    ours = rows.best(case, OURS[rows.device])
    if ours is None:
        return None
    moved = ties_merge_moved(case) / (ours["p50_us"] * 1e-6)
    return moved / (ours["copy_gbps"] * 1e9), ours["provider"]


@dataclass(frozen=True)
class Goal:
    """A limit on a figure, for every case of an op that was measured."""

    text: str
    device: str
    op: str
    rows: tuple[int, ...]
    variant: str
    limit: float
    at_most: bool
    figure: Callable[[Rows, Case], tuple[float, str] | None]
    shapes: tuple[str, ...] = ()

    def verdicts(self, rows: Rows) -> Iterator[Verdict]:
        """One for each case; one without a figure where there is none."""
        found = False
        for case in rows.cases(self.op, self.rows, self.variant):
            if self.shapes and case.shape not in self.shapes:
                continue
            measured = self.figure(rows, case)
            if measured:
                found = True
                yield Verdict(self.text, case.label, self.limit, self.at_most, *measured)
        if not found:
            yield Verdict(self.text, self.op, self.limit, self.at_most)


_LARGE = ("llama-3-8b",)
GOALS = (
    Goal(
        "packed delta GEMV / torch's dense GEMV",
        device="cpu",
        op="add_side_",
        rows=(1,),
        variant="all",
        limit=0.35,
        at_most=True,
        figure=_against_linear,
        shapes=_LARGE,
    ),
    Goal(
        "ties_merge, times faster than the topk composite",
        device="cpu",
        op="ties_merge",
        rows=(1,),
        variant="",
        limit=30.0,
        at_most=False,
        figure=_against_composite,
        shapes=_LARGE,
    ),
    Goal(
        "ties_merge's memory / result (which counts, and one buffer)",
        device="cpu",
        op="ties_merge",
        rows=(1,),
        variant="",
        limit=2.0,
        at_most=True,
        figure=_memory,
        shapes=_LARGE,
    ),
    Goal(
        "decode, every row routed / plain linear",
        device="cuda",
        op="dual_linear",
        rows=(1, 8),
        variant="all",
        limit=1.35,
        at_most=True,
        figure=_against_linear,
    ),
    Goal(
        "decode, no row routed / plain linear",
        device="cuda",
        op="dual_linear",
        rows=(1, 8),
        variant="none",
        limit=1.02,
        at_most=True,
        figure=_against_linear,
    ),
    Goal(
        "prefill, no row routed / plain linear",
        device="cuda",
        op="dual_linear",
        rows=(2048,),
        variant="none",
        limit=1.05,
        at_most=True,
        figure=_against_linear,
    ),
    Goal(
        "training step, times faster than the torch composite",
        device="cuda",
        op="train_step",
        rows=(1, 8, 128, 2048),
        variant="",
        limit=1.5,
        at_most=False,
        figure=_against_composite,
    ),
    Goal(
        "ties_merge, bytes moved / copy bandwidth",
        device="cuda",
        op="ties_merge",
        rows=(1,),
        variant="",
        limit=0.8,
        at_most=False,
        figure=_bandwidth,
    ),
)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every goal of the devices that the rows are from."""
    devices = {row["machine"]["device"] for row in rows}
    tables = {device: Rows(rows, device) for device in devices}
    return [
        verdict
        for goal in GOALS
        if goal.device in tables
        for verdict in goal.verdicts(tables[goal.device])
    ]


def main(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Rows of bench.run.", exists=True, dir_okay=False),
    ],
) -> None:
    """Print every goal with what was measured."""
    found = judge([row for file in files for row in bench_rows.read(file)])
    words = {True: "met", False: "missed", None: "not measured"}
    console.table(
        "",
        ("goal", "case", "by", "measured", "limit", ""),
        [
            (
                verdict.goal,
                verdict.case,
                verdict.provider,
                None if verdict.measured is None else f"{verdict.measured:.3f}",
                f"{'<=' if verdict.at_most else '>='} {verdict.limit:g}",
                words[verdict.met],
            )
            for verdict in found
        ],
        right=("measured", "limit"),
    )


if __name__ == "__main__":
    typer.run(main)
