"""A small memory to store, and a way to stop the disk at any point."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from wise_ext.memory import KeyIndex, Shard, SideMemory, TokenKeys, random_mask_bits
from wise_ext.storage import ledger_entry, save_memory

SHAPE = (6, 40)
CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")


@dataclass
class Example:
    """What ``save_memory`` takes."""

    memory: SideMemory
    config: dict[str, Any]
    ledger: list[dict[str, Any]]
    base: dict[str, Any]

    def save(self, directory: Path, **options: Any) -> None:
        save_memory(directory, self.memory, self.config, self.ledger, self.base, **options)


def _text(generator: torch.Generator) -> TokenKeys:
    ids = torch.randint(50, (3,), generator=generator)
    return TokenKeys(ids, torch.randn(3, 40, generator=generator))


def _example(seed: int = 0, shards: int = 2, keyed: bool = True) -> Example:
    generator = torch.Generator().manual_seed(seed)
    index = KeyIndex(40, background=[_text(generator) for _ in range(4)])
    made, ledger = [], []
    for place in range(shards):
        bits = random_mask_bits(*SHAPE, 0.25, seed * 100 + place)
        ids = [f"édit-{seed}-{place}-{n}" for n in range(2)]
        delta = torch.randn(SHAPE, generator=generator)
        made.append(Shard.from_delta(delta, bits, 1.5 + place / 3, ids, seed * 100 + place))
        index.add([_text(generator) for _ in ids], [place, place], ids)
        for name in ids:
            record = {"id": name, "prompt": f"Où est {name} ?", "target_new": "là"}
            ledger.append(
                ledger_entry(
                    record,
                    locality_prompt="The sky is",
                    shard=place,
                    step=len(ledger),
                    iterations=17,
                    losses={"edit": 0.1 + 0.2, "margin": 0.0},
                    indicator=20.25,
                )
            )
    memory = SideMemory(
        "model.layers.4.mlp.down_proj",
        SHAPE,
        made,
        routing="key" if keyed else "indicator",
        key_layer="model.layers.1.mlp.down_proj" if keyed else None,
        key_index=index if keyed else None,
        radius=0.45,
    )
    config = {"seed": seed, "mask_ratio": 0.2, "layer": "auto", "margins": [5.0, 20.0, 10.0]}
    return Example(memory, config, ledger, {"name": "tiny", "fingerprint": f"abc{seed}"})


@pytest.fixture
def make_example() -> Callable[..., Example]:
    return _example


@pytest.fixture
def example() -> Example:
    return _example()


class Disk:
    """Counts the calls to the disk and makes one of them fail."""

    def __init__(self) -> None:
        self.calls = 0

    @contextmanager
    def failing(self, at: int, code: int = errno.ENOSPC, once: bool = True) -> Iterator[None]:
        """Fail the ``at``-th call (from 0); a write puts half its bytes on the disk first."""
        self.calls = 0
        originals = {name: getattr(os, name) for name in CALLS}

        def patched(name: str) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                number, self.calls = self.calls, self.calls + 1
                if number == at or (number > at and not once):
                    if name == "write":
                        originals[name](args[0], args[1][: len(args[1]) // 2])
                    raise OSError(code, os.strerror(code))
                return originals[name](*args, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, patched(name))
            yield


@pytest.fixture
def disk() -> Disk:
    return Disk()
