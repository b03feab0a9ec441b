"""What is measured: a named shape, rows, shards and dtype for an op, and the grids of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# d_out x d_in of the down projection: model width x FFN width.
SHAPES: dict[str, tuple[int, int]] = {
    "tiny": (8, 32),
    "smollm2-135m": (576, 1536),
    "llama-3.2-1b": (2048, 8192),
    "llama-3-8b": (4096, 14336),
    "llama-2-7b": (4096, 11008),
    "llama-3-70b": (8192, 28672),
}
ROWS = (1, 8, 128, 2048)
SHARDS = (1, 6, 24)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSITY = 0.2
SKETCH_ROWS = 64
MERGED_DELTAS = 5
# What a shape without a meaning outside the dispatch bench is called.
DISPATCH_SHAPE = "tiny"


@dataclass(frozen=True)
class Case:
    """One thing to measure; what is no axis of the op is 1 or empty.

    Attributes:
        op: a key of `bench.registry.OPS`.
        shape: a key of `SHAPES`.
        rows: rows of x.
        shards: shards of the bank; deltas of ties_merge.
        dtype: a key of `DTYPES`: activations, weight and packed values. Deltas in training, their
            gradients and states are fp32 always.
        variant: of the op: which rows are routed, or the optimizer.
        grad: whether autograd records the call.
    """

    op: str
    shape: str
    rows: int = 1
    shards: int = 1
    dtype: str = "fp32"
    variant: str = ""
    grad: bool = False

    @property
    def d_out(self) -> int:
        """Model width."""
        return SHAPES[self.shape][0]

    @property
    def d_in(self) -> int:
        """FFN width."""
        return SHAPES[self.shape][1]

    @property
    def label(self) -> str:
        """The case on one line, for people."""
        parts = [self.op, self.shape, f"N={self.rows}", f"k={self.shards}", self.dtype]
        parts += [self.variant] if self.variant else []
        parts += ["grad"] if self.grad else []
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The fields, for a row."""
        return asdict(self)

    @staticmethod
    def from_json(row: dict[str, Any]) -> Case:
        """The case a row belongs to."""
        return Case(**{name: row[name] for name in Case.__dataclass_fields__})


@dataclass(frozen=True)
class Axes:
    """Which axes an op has."""

    rows: bool = True
    shards: bool = False
    variants: tuple[str, ...] = ("",)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    fixed_shards: int = 1


ROUTES = ("all", "half", "none")
AXES: dict[str, Axes] = {
    "add_side_": Axes(shards=True, variants=ROUTES),
    "dual_linear": Axes(shards=True, variants=ROUTES),
    "side_norm": Axes(shards=True),
    "linear_side_norm": Axes(shards=True),
    "sketch_norm": Axes(shards=True),
    "dual_linear_train": Axes(),
    "train_step": Axes(),
    "masked_update_": Axes(rows=False, variants=("adam", "sgd"), dtypes=("fp32",)),
    "pack": Axes(rows=False),
    "unpack": Axes(rows=False),
    "ties_merge": Axes(rows=False, dtypes=("fp32",), fixed_shards=MERGED_DELTAS),
    # Yardsticks: what the model pays without us.
    "linear": Axes(),
    "mv": Axes(rows=False),
}


def grid(
    ops: Iterable[str],
    shapes: Iterable[str],
    rows: Sequence[int] = ROWS,
    shards: Sequence[int] = SHARDS,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    variants: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Every combination that the ops have axes for; `variants` None: all of them."""
    shapes = list(shapes)
    for op in ops:
        axes = AXES[op]
        for shape in shapes:
            for dtype in (name for name in dtypes if name in axes.dtypes):
                for variant in axes.variants:
                    if variants is not None and variant and variant not in variants:
                        continue
                    for count in rows if axes.rows else (1,):
                        for k in shards if axes.shards else (axes.fixed_shards,):
                            yield Case(op, shape, count, k, dtype, variant)


def _full(device: str) -> list[Case]:
    shapes = [name for name in SHAPES if name != DISPATCH_SHAPE]
    return list(grid(AXES, shapes, dtypes=tuple(DTYPES)))


def _default(device: str) -> list[Case]:
    """On the CPU under five minutes of one thread, on a card under ten."""
    if device == "cuda":
        shapes = ["smollm2-135m", "llama-3-8b"]
        return list(grid(AXES, shapes, shards=(1, 6), dtypes=("bf16", "fp32")))
    small = list(
        grid(AXES, ["smollm2-135m"], (1, 8, 128), (1, 6), variants=("all", "none", "adam"))
    )
    large_ops = ["add_side_", "dual_linear", "linear_side_norm", "linear", "mv"]
    return small + list(grid(large_ops, ["llama-3-8b"], (1,), (1,), variants=("all",)))


def _goals(device: str) -> list[Case]:
    """What `bench.goals` asks for."""
    if device == "cpu":
        gemv = grid(
            ["add_side_", "linear", "mv"], ["llama-3-8b"], (1,), (1,), ("fp32", "bf16"), ("all",)
        )
        return [*gemv, *grid(["ties_merge"], ["llama-3-8b"])]
    shapes = [name for name in SHAPES if name != DISPATCH_SHAPE]
    decode = grid(["linear", "dual_linear"], shapes, (1, 8), (1,), ("bf16",), ("all", "none"))
    prefill = grid(["linear", "dual_linear"], shapes, (2048,), (1,), ("bf16",), ("none",))
    train = grid(["train_step"], ["llama-3-8b", "llama-3.2-1b"], (128, 2048))
    return [*decode, *prefill, *train, *grid(["ties_merge"], ["llama-3.2-1b", "llama-3-8b"])]


def _dispatch(device: str) -> list[Case]:
    """One call on tiny tensors: what is left is the way to the kernel."""
    plain = grid(
        ["add_side_", "dual_linear", "side_norm", "sketch_norm", "dual_linear_train"],
        [DISPATCH_SHAPE],
        (2,),
        (1,),
        ("fp32",),
        ("all",),
    )
    recorded = [
        Case("dual_linear", DISPATCH_SHAPE, 2, variant="all", grad=True),
        Case("dual_linear_train", DISPATCH_SHAPE, 2, grad=True),
    ]
    update = Case("masked_update_", DISPATCH_SHAPE, variant="adam")
    yardstick = Case("linear", DISPATCH_SHAPE, 2)
    return [*plain, *recorded, update, yardstick]


SUITES: dict[str, Callable[[str], list[Case]]] = {
    "default": _default,
    "goals": _goals,
    "full": _full,
    "dispatch": _dispatch,
}


@dataclass(frozen=True)
class Filter:
    """What of a suite is wanted; empty: everything. An axis an op lacks never excludes it."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    shards: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for in particular."""
        return self == Filter()

    def keeps(self, case: Case) -> bool:
        """Whether a case is wanted."""
        axes = AXES[case.op]
        return (
            _among(case.op, self.ops)
            and _among(case.shape, self.shapes)
            and _among(case.dtype, self.dtypes)
            and (not axes.rows or _among(case.rows, self.rows))
            and (not axes.shards or _among(case.shards, self.shards))
            and (axes.variants == ("",) or _among(case.variant, self.variants))
        )


def choose(device: str, suite: str | None, wanted: Filter) -> list[Case]:
    """The cases of a suite that are wanted, each once.

    Without a suite: the default one, or the full grid once something is asked for in particular.
    """
    if suite is None:
        suite = "default" if wanted.empty else "full"
    return list(dict.fromkeys(filter(wanted.keeps, SUITES[suite](device))))


def _among(value: object, wanted: tuple[object, ...]) -> bool:
    return not wanted or value in wanted
