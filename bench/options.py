"""Options that `bench.run` and `bench.compare` share, and what they mean."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.cases import AXES, DTYPES, SHAPES, SUITES, Filter
from bench.registry import PROVIDERS
from wise_ext.cli import console


class DeviceName(StrEnum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


SuiteName = StrEnum("SuiteName", list(SUITES))  # type: ignore[misc]

Device = Annotated[DeviceName, typer.Option(help="Where to measure.")]
Suite = Annotated[
    SuiteName | None,
    typer.Option(
        help="Which cases: 'default' (a few minutes), what 'goals' need, 'dispatch', or the 'full' "
        "grid, which is taken where other options choose from it.",
        show_default=False,
    ),
]


def _several(name: str, known: object, help_text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        f"--{name}", help=f"{help_text} (repeat for more): {known}", show_default=False
    )
    return option


Ops = Annotated[list[str] | None, _several("op", ", ".join(AXES), "Only this op")]
Providers = Annotated[
    list[str] | None,
    _several("provider", ", ".join(PROVIDERS), "Only this provider; without, all but compiled"),
]
Shapes = Annotated[list[str] | None, _several("shape", ", ".join(SHAPES), "Only this shape")]
Rows = Annotated[list[int] | None, _several("rows", "1, 8, 128, 2048", "Only so many rows")]
Shards = Annotated[list[int] | None, _several("shards", "1, 6, 24", "Only so many shards")]
Dtypes = Annotated[list[str] | None, _several("dtype", ", ".join(DTYPES), "Only this dtype")]
Variants = Annotated[
    list[str] | None,
    _several("variant", "all, half, none; adam, sgd", "Only these rows routed, this optimizer"),
]
Json = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Append a JSON line a row to this file.")
]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time for each provider of each case.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")]


def prepare(device: str, threads: int) -> None:
    """Set the threads; leave with one line where the device is not there."""
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        console.complain("there is no CUDA device here: measure with --device cpu")
        raise typer.Exit(1)


def wanted(
    ops: list[str] | None,
    shapes: list[str] | None,
    rows: list[int] | None,
    shards: list[int] | None,
    dtypes: list[str] | None,
    variants: list[str] | None,
) -> Filter:
    """The filter the options spell; leave with one line for a word that is not known."""
    known: dict[str, tuple[list[str] | None, object]] = {
        "op": (ops, AXES),
        "shape": (shapes, SHAPES),
        "dtype": (dtypes, DTYPES),
        "variant": (variants, {name for axes in AXES.values() for name in axes.variants if name}),
    }
    for name, (given, choices) in known.items():
        check_words(name, given, choices)
    return Filter(
        tuple(ops or ()),
        tuple(shapes or ()),
        tuple(rows or ()),
        tuple(shards or ()),
        tuple(dtypes or ()),
        tuple(variants or ()),
    )


def check_words(name: str, given: list[str] | None, choices: object) -> None:
    """Leave with one line for a word that is none of the choices."""
    names = list(choices)  # type: ignore[call-overload]
    for word in given or ():
        if word not in names:
            console.complain(f"unknown {name} {word!r}: choose from {', '.join(sorted(names))}")
            raise typer.Exit(1)
