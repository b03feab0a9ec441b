"""Seeded inputs of a case, of the size and scale that an edited model has."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.cases import DENSITY, DTYPES, SKETCH_ROWS, Case
from wise_ext.memory.masks import bits_per_row, random_mask_bits

# Further shards' masks are the first one's, its rows moved on by so many: drawing a large mask
# takes seconds, and a kernel cannot tell.
_ROLL = 37


@lru_cache(maxsize=2)
def _mask(d_out: int, d_in: int) -> Tensor:
    return random_mask_bits(d_out, d_in, DENSITY, seed=0)


class Inputs:
    """The tensors of one case on one device; what an op does not need is never made.

    Values are scaled so that products with a row of x come out near 1: nothing overflows in fp16,
    and repeated in-place additions stay finite.
    """

    def __init__(self, case: Case, device: torch.device | str) -> None:
        self.case, self.device = case, torch.device(device)
        self.dtype = DTYPES[case.dtype]
        self._generator = torch.Generator(self.device)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            # Seeded by its name: a tensor is the same whatever was asked for before it.
            outer, self._generator = self._generator, torch.Generator(self.device)
            self._generator.manual_seed(zlib.crc32(name.encode()))
            try:
                self._made[name] = getattr(self, f"_{name}")()
            finally:
                self._generator = outer
        return self._made[name]

    def get(self, *names: str) -> tuple[Any, ...]:
        """Several at once."""
        return tuple(self[name] for name in names)

    def with_copies(self, names: tuple[str, ...]) -> Inputs:
        """The same inputs, those that a call changes copied."""
        return _Copies(self, names)

    def normal(self, *size: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Standard normal numbers times `scale`."""
        drawn = torch.randn(size, generator=self._generator, device=self.device)
        return drawn.mul_(scale).to(dtype or self.dtype)

    def _x(self) -> Tensor:
        return self.normal(self.case.rows, self.case.d_in).requires_grad_(self.case.grad)

    def _vector(self) -> Tensor:
        return self.normal(self.case.d_in)

    def _y(self) -> Tensor:
        return self.normal(self.case.rows, self.case.d_out)

    def _base(self) -> Tensor:
        return self.normal(self.case.rows, self.case.d_out)

    def _weight(self) -> Tensor:
        case = self.case
        return self.normal(case.d_out, case.d_in, scale=case.d_in**-0.5)

    def _mask_bits(self) -> Tensor:
        """int32 [k, d_out, W]."""
        mask = _mask(self.case.d_out, self.case.d_in).to(self.device)
        return torch.stack([mask.roll(_ROLL * shard, 0) for shard in range(self.case.shards)])

    def _values(self) -> Tensor:
        a_row = bits_per_row(self.case.d_in, DENSITY)
        return self.normal(self.case.shards * self.case.d_out * a_row, scale=a_row**-0.5)

    def _row_ptr(self) -> Tensor:
        # Every row of a mask has the same number of bits.
        a_row = bits_per_row(self.case.d_in, DENSITY)
        rows = self.case.shards * self.case.d_out
        return torch.arange(rows + 1, device=self.device) * a_row

    def _bank(self) -> tuple[Tensor, Tensor, Tensor]:
        return self["mask_bits"], self["values"], self["row_ptr"]

    def _route(self) -> Tensor:
        return routes(self.case, self.device)

    def _rows(self) -> Tensor:
        """The row of every pair: all rows with all shards."""
        rows = torch.arange(self.case.rows, dtype=torch.int32, device=self.device)
        return rows.repeat_interleave(self.case.shards)

    def _shards(self) -> Tensor:
        shards = torch.arange(self.case.shards, dtype=torch.int32, device=self.device)
        return shards.repeat(self.case.rows)

    def _sketch(self) -> Tensor:
        case = self.case
        return self.normal(case.shards, SKETCH_ROWS, case.d_in, scale=case.d_in**-0.5)

    def _bools(self) -> Tensor:
        """The first mask, bool [d_out, d_in]."""
        shifts = torch.arange(32, dtype=torch.int32, device=self.device)
        mask: Tensor = self["mask_bits"][0]
        bits = (mask.unsqueeze(-1) >> shifts) & 1
        return bits.bool().flatten(-2)[:, : self.case.d_in]

    def _dense(self) -> list[Tensor]:
        """Every shard's delta as a matrix: what the composites multiply with."""
        case, (mask_bits, values, row_ptr) = self.case, self["bank"]
        unpack = torch.ops.wise_ext_reference.unpack
        pointers = (row_ptr[k * case.d_out : (k + 1) * case.d_out + 1] for k in range(case.shards))
        return [
            unpack(mask, values, part, case.d_in)
            for mask, part in zip(mask_bits, pointers, strict=True)
        ]

    def _delta(self) -> Tensor:
        """The delta in training, fp32, zero outside the first mask."""
        case = self.case
        scale = bits_per_row(case.d_in, DENSITY) ** -0.5
        drawn = self.normal(case.d_out, case.d_in, dtype=torch.float32, scale=scale)
        return drawn.masked_fill_(~self["bools"], 0.0).requires_grad_(case.grad)

    def _packable(self) -> Tensor:
        """A delta to pack, in the case's dtype."""
        delta: Tensor = self["delta"]
        return delta.to(self.dtype)

    def _shard_ptr(self) -> Tensor:
        row_ptr: Tensor = self["row_ptr"]
        return row_ptr[: self.case.d_out + 1].contiguous()

    def _grad(self) -> Tensor:
        return self.normal(self.case.d_out, self.case.d_in, dtype=torch.float32)

    def _m(self) -> Tensor | None:
        if self.case.variant == "sgd":
            return None
        return self.normal(int(self["shard_ptr"][-1]), dtype=torch.float32, scale=0.1)

    def _v(self) -> Tensor | None:
        # Well above 0: Adam divides by its root, and a first step from 0 only takes signs.
        if self.case.variant == "sgd":
            return None
        return self.normal(int(self["shard_ptr"][-1]), dtype=torch.float32).square_().add_(0.5)

    def _grad_y(self) -> Tensor:
        return self.normal(self.case.rows, self.case.d_out, scale=self.case.rows**-0.5)

    def _grad_indicator(self) -> Tensor:
        return self.normal(self.case.rows, dtype=torch.float32)

    def _deltas(self) -> list[Tensor]:
        """Deltas that are a fifth dense, each under its own mask."""
        case, found = self.case, []
        for shard in range(case.shards):
            mask = self["bools"].roll(_ROLL * shard, 0)
            drawn = self.normal(case.d_out, case.d_in, dtype=torch.float32)
            found.append(drawn.masked_fill_(~mask, 0.0))
        return found


class _Copies(Inputs):
    """Inputs that share everything but a few tensors with others."""

    def __init__(self, origin: Inputs, names: tuple[str, ...]) -> None:
        super().__init__(origin.case, origin.device)
        self._origin, self._names = origin, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            return self._origin[name]
        if name not in self._made:
            made = self._origin[name]
            copy = None if made is None else made.detach().clone()
            self._made[name] = copy if copy is None else copy.requires_grad_(made.requires_grad)
        return self._made[name]


def routes(case: Case, device: torch.device | str) -> Tensor:
    """int32 [N]: the rows of `variant` (all, every other, none) over the shards in turn."""
    rows = torch.arange(case.rows, dtype=torch.int32, device=device)
    if case.variant == "none":
        return torch.full_like(rows, -1)
    if case.variant == "half":
        return torch.where(rows % 2 == 0, (rows // 2) % case.shards, -1).to(torch.int32)
    return rows % case.shards
