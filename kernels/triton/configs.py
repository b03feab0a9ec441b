"""Which block sizes a kernel is launched with: read from tables/, chosen by op, dtype and rows.

A table is one architecture's: `sm80` (A100 and consumer cards since), `sm90` (Hopper and data
centre cards since), and `interpreter`, whose few, large blocks keep Triton's interpreter quick.
bench/tune.py measures candidates on a card and rewrites that card's table; `provenance` in each
says where it is from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

TABLES = Path(__file__).with_name("tables")
INTERPRETER = "interpreter"
DTYPE_KEYS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Triton decides this at import too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    `blocks` maps the kernel's own constexpr names to sizes, so `kernel[grid](..., **config.launch)`
    is a whole launch.
    """

    blocks: Mapping[str, int] = field(hash=False)
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told besides the blocks."""
        # The last is said outright because Triton's default depends on its version.
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    @cached_property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch: the blocks and the options."""
        return {**self.blocks, **self.options}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled ahead of time, to be looked into without a card.

    `signature` maps every argument that is no constant, in the kernel's order, to Triton's type;
    a type that ends in ":16" promises a multiple of 16 (an aligned pointer, an even stride), as
    the launcher finds at run time. `constants` has all other arguments (the config's blocks may be
    left out: they are added). `dot` says that the kernel must use the tensor cores.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str] = field(hash=False)
    constants: Mapping[str, Any] = field(hash=False)
    config: Config
    dot: bool


Entries = tuple[tuple[int | None, Config], ...]


def dtype_key(dtype: torch.dtype) -> str:
    """The name a dtype has in the tables, and in Triton's types."""
    return DTYPE_KEYS[dtype]


def pick(op: str, key: str, rows: int, device: torch.device) -> Config:
    """The config for `rows` rows of dtype `key` ("fp32", "bf16", "fp16") on a device."""
    for max_rows, config in _entries(_table_of(device), op, key):
        if max_rows is None or rows <= max_rows:
            return config
    raise AssertionError("a table's last entry has no limit")


def every(op: str, key: str, arch: int | str) -> list[Config]:
    """All different configs of an architecture (80, 90, "interpreter"), for compiling them all."""
    name = arch if isinstance(arch, str) else f"sm{arch}"
    return list(dict.fromkeys(config for _, config in _entries(name, op, key)))


def architecture(capability: tuple[int, int]) -> str:
    """The table for a compute capability."""
    # 12.x is newer than Hopper but built like 8.9: less shared memory, no warp group instructions.
    if capability[0] in (8, 12):
        return "sm80"
    if capability[0] >= 9:
        return "sm90"
    have = f"{capability[0]}.{capability[1]}"
    raise ValueError(f"wise_ext's Triton kernels need compute capability 8.0 or newer, got {have}")


@cache
def _table_of(device: torch.device) -> str:
    if INTERPRETED or device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"wise_ext's Triton kernels need a CUDA device, got {device.type}")
    return architecture(torch.cuda.get_device_capability(device))


@cache
def _entries(table: str, op: str, key: str) -> Entries:
    ops = _load(table)
    if key not in ops.get(op, {}):
        raise ValueError(f"the {table} table has no entry for {op} in {key}")
    return ops[op][key]


@cache
def _load(table: str) -> dict[str, dict[str, Entries]]:
    return read_table(TABLES / f"{table}.json")


def read_table(path: Path) -> dict[str, dict[str, Entries]]:
    """Read and check one table: op -> dtype -> entries of rising `max_rows`, the last without."""
    try:
        ops = json.loads(path.read_text(encoding="utf-8"))["ops"]
        return {
            op: {key: _parse(f"{op}, {key}", entries) for key, entries in by_dtype.items()}
            for op, by_dtype in ops.items()
        }
    except FileNotFoundError:
        raise ValueError(f"there is no table {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a valid table: {cause}") from None


def _parse(where: str, entries: list[dict[str, Any]]) -> Entries:
    limits = [entry["max_rows"] for entry in entries]
    if not limits or limits[-1] is not None:
        raise ValueError(f"{where}: the last entry's max_rows must be null")
    finite = limits[:-1]
    if any(not _positive(limit) for limit in finite) or finite != sorted(set(finite)):
        raise ValueError(f"{where}: max_rows must rise")
    return tuple((entry["max_rows"], _config(where, entry)) for entry in entries)


def _config(where: str, entry: dict[str, Any]) -> Config:
    blocks, warps, stages = entry["blocks"], entry["num_warps"], entry["num_stages"]
    for name, size in {**blocks, "num_warps": warps}.items():
        if not _positive(size) or size & (size - 1):
            raise ValueError(f"{where}: {name} must be a power of two, got {size!r}")
    if not _positive(stages):
        raise ValueError(f"{where}: num_stages must be a positive integer, got {stages!r}")
    return Config(MappingProxyType(dict(blocks)), warps, stages)


def _positive(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0
