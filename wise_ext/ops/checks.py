"""What an op accepts, for references and fakes; csrc/check.h says the same for native kernels.

Every failure is a `RuntimeError`, as from torch's own ops, and starts with the op's name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def words(d_in: int) -> int:
    """32-bit mask words a row of `d_in` columns takes."""
    return (d_in + 31) // 32


def require(condition: bool, message: str) -> None:
    """Raise `RuntimeError(message)` unless the condition holds."""
    if not condition:
        raise RuntimeError(message)


def floating(op: str, **tensors: Tensor) -> None:
    """Each tensor must hold a dtype the ops compute with."""
    for name, tensor in tensors.items():
        require(
            tensor.dtype in FLOATS,
            f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}",
        )


def full_precision(op: str, **tensors: Tensor) -> None:
    """Each tensor must be float32 (float64 too, for the reference)."""
    for name, tensor in tensors.items():
        require(
            tensor.dtype in (torch.float32, torch.float64),
            f"{op}: {name} must be float32, got {tensor.dtype}",
        )


def integer(op: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Each tensor must have exactly this integer dtype."""
    name_of = str(dtype).removeprefix("torch.")
    for name, tensor in tensors.items():
        require(tensor.dtype == dtype, f"{op}: {name} must be {name_of}, got {tensor.dtype}")


def dims(op: str, count: int, **tensors: Tensor) -> None:
    """Each tensor must have `count` dimensions."""
    for name, tensor in tensors.items():
        require(
            tensor.dim() == count,
            f"{op}: {name} must have {count} dimension{'s' * (count > 1)}, got {tensor.dim()}",
        )


def same_device(op: str, **tensors: Tensor) -> None:
    """All tensors must be where the first is."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        require(
            tensor.device == reference.device,
            f"{op}: {name} is on {tensor.device} but {first} is on {reference.device}; "
            "all tensors must be on one device",
        )


def contiguous_rows(op: str, name: str, tensor: Tensor) -> None:
    """A 2-d tensor changed in place may have padding between rows, not inside them."""
    require(
        tensor.shape[1] <= 1 or tensor.stride(1) == 1,
        f"{op}: {name} is changed in place, so its rows must be contiguous",
    )


def mask(op: str, mask_bits: Tensor, d_out: int, d_in: int) -> None:
    """One shard's mask, int32 [d_out, W]."""
    integer(op, torch.int32, mask_bits=mask_bits)
    dims(op, 2, mask_bits=mask_bits)
    require(
        mask_bits.shape[0] == d_out,
        f"{op}: mask_bits has {mask_bits.shape[0]} rows, expected d_out = {d_out}",
    )
    require(
        mask_bits.shape[1] == words(d_in),
        f"{op}: mask_bits has {mask_bits.shape[1]} words a row, d_in = {d_in} needs {words(d_in)}",
    )


def bank(
    op: str, x: Tensor, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_out: int | None = None
) -> None:
    """x [N, d_in] and a bank: mask_bits [k, d_out, W], values [nnz], row_ptr [k*d_out + 1]."""
    floating(op, x=x, values=values)
    integer(op, torch.int32, mask_bits=mask_bits)
    integer(op, torch.int64, row_ptr=row_ptr)
    dims(op, 2, x=x)
    dims(op, 3, mask_bits=mask_bits)
    dims(op, 1, values=values, row_ptr=row_ptr)
    same_device(op, x=x, mask_bits=mask_bits, values=values, row_ptr=row_ptr)
    k, rows, width = mask_bits.shape
    d_in = x.shape[1]
    require(
        d_out is None or rows == d_out,
        f"{op}: mask_bits has {rows} rows a shard, expected d_out = {d_out}",
    )
    require(
        width == words(d_in),
        f"{op}: mask_bits has {width} words a row, d_in = {d_in} needs {words(d_in)}",
    )
    pointers(op, row_ptr, k * rows)


def pointers(op: str, row_ptr: Tensor, rows: int) -> None:
    """row_ptr must be int64 [rows + 1]."""
    integer(op, torch.int64, row_ptr=row_ptr)
    dims(op, 1, row_ptr=row_ptr)
    require(
        row_ptr.shape[0] == rows + 1,
        f"{op}: row_ptr must have {rows + 1} entries (one a packed row, plus one), "
        f"got {row_ptr.shape[0]}",
    )


def pointers_fit(op: str, row_ptr: Tensor, counts: Tensor, values: int) -> None:
    """The offsets must agree with the mask's set bits and stay inside values (reads the data)."""
    good = bool((row_ptr.diff() == counts).all()) and int(row_ptr[0]) >= 0
    require(
        good and int(row_ptr[-1]) <= values,
        f"{op}: row_ptr does not match the bits set in mask_bits and the {values} values",
    )


def in_range(op: str, name: str, index: Tensor, low: int, high: int) -> None:
    """`low <= index <= high` for every entry (reads the data)."""
    if index.numel() == 0:
        return
    smallest, largest = int(index.min()), int(index.max())
    bad = smallest if smallest < low else largest
    require(
        low <= smallest and largest <= high,
        f"{op}: {name} must be between {low} and {high}, got {bad}",
    )


def route(op: str, route: Tensor, rows: int, device: torch.device) -> None:
    """route must be int32 [rows] next to x."""
    integer(op, torch.int32, route=route)
    dims(op, 1, route=route)
    require(
        route.shape[0] == rows,
        f"{op}: route must have one entry a row of x ({rows}), got {route.shape[0]}",
    )
    require(
        route.device == device,
        f"{op}: route is on {route.device} but x is on {device}; all tensors must be on one device",
    )


def side(
    op: str,
    y: Tensor,
    x: Tensor,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    routes: Tensor,
) -> None:
    """`add_side_`'s arguments: y [N, d_out] next to a bank, x [N, d_in] and one route a row."""
    dims(op, 2, y=y, x=x)
    floating(op, y=y)
    require(y.shape[0] == x.shape[0], f"{op}: y has {y.shape[0]} rows, x has {x.shape[0]}")
    contiguous_rows(op, "y", y)
    same_device(op, x=x, y=y)
    bank(op, x, mask_bits, values, row_ptr, y.shape[1])
    route(op, routes, x.shape[0], x.device)


def low_rank(
    op: str,
    y: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    rank_ptr: Tensor,
    routes: Tensor,
) -> None:
    """`add_low_rank_`'s arguments: left [R, d_out], right [R, d_in], rank_ptr [k + 1], routes."""
    dims(op, 2, y=y, x=x, left=left, right=right)
    floating(op, y=y, x=x, left=left, right=right)
    integer(op, torch.int64, rank_ptr=rank_ptr)
    dims(op, 1, rank_ptr=rank_ptr)
    require(y.shape[0] == x.shape[0], f"{op}: y has {y.shape[0]} rows, x has {x.shape[0]}")
    contiguous_rows(op, "y", y)
    same_device(op, x=x, y=y, left=left, right=right, rank_ptr=rank_ptr)
    require(left.dtype == right.dtype, f"{op}: right is {right.dtype} but left is {left.dtype}")
    require(
        left.shape[0] == right.shape[0],
        f"{op}: left has {left.shape[0]} rows, right has {right.shape[0]}",
    )
    require(
        y.shape[1] == left.shape[1],
        f"{op}: y has d_out = {y.shape[1]}, left has {left.shape[1]}",
    )
    require(
        x.shape[1] == right.shape[1],
        f"{op}: x has d_in = {x.shape[1]}, right has {right.shape[1]}",
    )
    require(
        rank_ptr.shape[0] > 0,
        f"{op}: rank_ptr must have an entry a shard, plus one, got none",
    )
    route(op, routes, x.shape[0], x.device)


def ranks_fit(op: str, rank_ptr: Tensor, rows: int) -> None:
    """rank_ptr must go from 0 to the number of rows, never down (reads the data)."""
    good = (rank_ptr.diff() >= 0).all() & (rank_ptr[0] == 0) & (rank_ptr[-1] == rows)
    require(
        bool(good),
        f"{op}: rank_ptr must ascend from 0 to the {rows} rows of left and right",
    )


def linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`F.linear`'s arguments: x [N, d_in], weight [d_out, d_in], bias [d_out], one dtype."""
    floating(op, x=x, weight=weight)
    dims(op, 2, x=x, weight=weight)
    same_device(op, x=x, weight=weight)
    require(x.dtype == weight.dtype, f"{op}: weight is {weight.dtype} but x is {x.dtype}")
    require(
        x.shape[1] == weight.shape[1],
        f"{op}: x has d_in = {x.shape[1]}, weight has {weight.shape[1]}",
    )
    if bias is None:
        return
    same_device(op, x=x, bias=bias)
    require(bias.dtype == x.dtype, f"{op}: bias is {bias.dtype} but x is {x.dtype}")
    require(
        tuple(bias.shape) == (weight.shape[0],),
        f"{op}: bias must have shape [{weight.shape[0]}], got {list(bias.shape)}",
    )


def pairs(
    op: str,
    x: Tensor,
    mask_bits: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    rows: Tensor,
    shards: Tensor,
) -> None:
    """`side_norm`'s arguments: a bank, x, and equally long int32 rows and shards."""
    bank(op, x, mask_bits, values, row_ptr)
    integer(op, torch.int32, rows=rows, shards=shards)
    dims(op, 1, rows=rows, shards=shards)
    same_device(op, x=x, rows=rows, shards=shards)
    require(
        rows.shape == shards.shape,
        f"{op}: rows has {rows.shape[0]} entries, shards has {shards.shape[0]}",
    )


def sketch(op: str, x: Tensor, sketches: Tensor) -> None:
    """`sketch_norm`'s arguments: x [N, d_in] and one [r, d_in] projection a shard."""
    floating(op, x=x, sketch=sketches)
    dims(op, 2, x=x)
    dims(op, 3, sketch=sketches)
    same_device(op, x=x, sketch=sketches)
    require(
        x.shape[1] == sketches.shape[2],
        f"{op}: x has d_in = {x.shape[1]}, sketch has {sketches.shape[2]}",
    )


def entries(
    op: str, query: Tensor, keys: Tensor, scales: Tensor, places: Tensor, weights: Tensor
) -> None:
    """`max_sim`'s arguments: query [B, t, width], keys and their scales, places and weights."""
    for name, tensor in {"query": query, "scales": scales, "weights": weights}.items():
        require(tensor.dtype == torch.float32, f"{op}: {name} must be float32, got {tensor.dtype}")
    integer(op, torch.int8, keys=keys)
    integer(op, torch.int32, places=places)
    dims(op, 3, query=query)
    dims(op, 2, keys=keys, places=places)
    dims(op, 1, scales=scales)
    same_device(op, query=query, keys=keys, scales=scales, places=places, weights=weights)
    require(
        query.shape[2] == keys.shape[1],
        f"{op}: query has width {query.shape[2]}, keys have {keys.shape[1]}",
    )
    require(
        scales.shape[0] == keys.shape[0],
        f"{op}: there are {keys.shape[0]} keys, but {scales.shape[0]} scales",
    )
    require(
        weights.shape == places.shape,
        f"{op}: weights must have shape {list(places.shape)}, got {list(weights.shape)}",
    )


def ties(op: str, deltas: list[Tensor], weights: list[float], density: float) -> None:
    """Equally shaped float32 deltas, one weight >= 0 each, density in (0, 1]."""
    require(len(deltas) > 0, f"{op}: needs at least one delta")
    require(
        len(weights) == len(deltas),
        f"{op}: got {len(weights)} weights for {len(deltas)} deltas",
    )
    require(
        all(0 <= weight < float("inf") for weight in weights),
        f"{op}: weights must be finite and not negative",
    )
    require(0 < density <= 1, f"{op}: density must be in (0, 1], got {density}")
    for index, delta in enumerate(deltas):
        full_precision(op, **{f"deltas[{index}]": delta})
        require(
            delta.shape == deltas[0].shape,
            f"{op}: deltas[{index}] has shape {list(delta.shape)}, "
            f"deltas[0] has {list(deltas[0].shape)}",
        )
        require(
            delta.device == deltas[0].device,
            f"{op}: deltas[{index}] is on {delta.device} but deltas[0] is on "
            f"{deltas[0].device}; all tensors must be on one device",
        )


def packable(op: str, delta: Tensor, mask_bits: Tensor) -> None:
    """delta [d_out, d_in] next to its mask."""
    floating(op, delta=delta)
    dims(op, 2, delta=delta)
    same_device(op, delta=delta, mask_bits=mask_bits)
    mask(op, mask_bits, delta.shape[0], delta.shape[1])


def unpackable(op: str, mask_bits: Tensor, values: Tensor, row_ptr: Tensor, d_in: int) -> None:
    """One shard's packed form; row_ptr int64 [d_out + 1]."""
    floating(op, values=values)
    dims(op, 1, values=values)
    dims(op, 2, mask_bits=mask_bits)
    same_device(op, values=values, mask_bits=mask_bits, row_ptr=row_ptr)
    mask(op, mask_bits, mask_bits.shape[0], d_in)
    pointers(op, row_ptr, mask_bits.shape[0])


def kept(density: float, nonzero: int) -> int:
    """How many of `nonzero` entries TIES keeps: the ceiling, so never none."""
    return min(nonzero, max(1, math.ceil(density * nonzero)))
