"""Which implementation of an op a device should get: a table over facts, never a trial.

Providers: "native" (the compiled module: C++ on the CPU, CUDA C++ on a GPU), "triton", and
"reference" (pure torch, everywhere). Where two can run an op on a GPU, the number of rows decides:
a few rows make a product memory-bound, many make it a matrix product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from wise_ext.errors import NativeError

Provider = Literal["native", "triton", "reference"]
# For few rows, and for many. A plain tuple: torch.compile takes it for the constant it is.
Selection = tuple[Provider, Provider]

# Up to here a routed product is memory's work (CUDA C++), beyond it the tensor cores' (Triton).
# Pairs for side_norm. From the shapes of the kernels; not measured yet.
FEW_ROWS = 16
TRITON_OLDEST_CAPABILITY = (8, 0)

# The ops that have a kernel for each.
BY_ROWS = ("add_side_", "dual_linear", "side_norm")


@dataclass(frozen=True)
class Facts:
    """What is there to choose from.

    Attributes:
        native: (op, device type) of every kernel the compiled module has registered.
        triton: the ops Triton has a kernel of; empty without Triton.
        capability: of the GPU, such as (9, 0); None on the CPU.
        architectures: what the module's CUDA kernels were compiled for, such as "80 90a+PTX".
    """

    native: frozenset[tuple[str, str]]
    triton: frozenset[str]
    capability: tuple[int, int] | None = None
    architectures: str = ""


def select(op: str, device_type: str, facts: Facts) -> Selection:
    """The best providers of `op` on a device of this type, for few rows and for many."""
    usable = [provider for provider in _ORDER if can_run(provider, op, device_type, facts)]
    few = many = usable[0]
    if op in BY_ROWS and "triton" in usable:
        many = "triton"
    return few, many


def at(selection: Selection, rows: int) -> Provider:
    """The provider for so many rows (pairs, for side_norm)."""
    few, many = selection
    # Compared only where it matters: under torch.compile the comparison is a guard.
    return few if few == many or rows <= FEW_ROWS else many


def can_run(provider: Provider, op: str, device_type: str, facts: Facts) -> bool:
    """Whether a provider has the op for a device of this type."""
    if provider == "reference":
        return True
    if device_type == "cpu":
        return provider == "native" and (op, device_type) in facts.native
    if device_type != "cuda" or facts.capability is None:
        return False
    if provider == "triton":
        return op in facts.triton and facts.capability >= TRITON_OLDEST_CAPABILITY
    return (op, device_type) in facts.native and covers(facts.architectures, facts.capability)


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for these architectures run on a GPU of this capability.

    Code for one architecture runs on later ones of the same major number, architecture-specific
    code (`90a`) on exactly its own; `+PTX` runs on everything from its architecture on.

    Raises:
        NativeError: the list is not one a build writes.
    """
    for item in architectures.split():
        match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
        if match is None:
            raise NativeError(f"the native module names an unknown CUDA architecture: {item!r}")
        have = int(match[1]), int(match[2])
        if have == capability or (match[4] and have <= capability):
            return True
        if not match[3] and have[0] == capability[0] and have <= capability:
            return True
    return False


def why_not(provider: Provider, op: str, device_type: str, facts: Facts) -> str:
    """The reason a provider cannot run an op, for messages and reports."""
    if provider == "native":
        if (op, device_type) not in facts.native:
            return f"the native module has no {device_type} kernel of it"
        return (
            f"its CUDA kernels are compiled for {facts.architectures}, the device is "
            f"{'.'.join(map(str, facts.capability or ()))}"
        )
    if not facts.triton:
        return "triton is not installed"
    if op not in facts.triton:
        return "there is no Triton kernel of it"
    if device_type != "cuda" or facts.capability is None:
        return "Triton kernels need a CUDA device"
    return f"Triton kernels need compute capability 8.0, the device has {facts.capability}"


_ORDER: tuple[Provider, ...] = ("native", "triton", "reference")
