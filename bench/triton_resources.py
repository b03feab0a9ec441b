"""What the compiler makes of every Triton kernel and config, looked into without a card.

python -m bench.triton_resources   writes bench/results/triton-resources.jsonl
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wise_ext.triton_kernels import configs

MODULES = (
    "dual_linear",
    "dual_linear_train",
    "low_rank",
    "masked_update",
    "side_norm",
    "sketch_norm",
)
ARCHITECTURES = (80, 90)
RESULTS = Path(__file__).with_name("results") / "triton-resources.jsonl"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# The instruction that multiplies on the tensor cores.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
# Shared memory a block may have. The table of 80 also serves the cards of 8.6, 8.9 and 12.0, which
# have less than the A100.
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}

# An instruction of a listing: its address, perhaps a predicate, and its name up to the first dot.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        registers: a thread.
        shared_bytes: a block, dynamic shared memory included.
        stack_bytes: a thread.
        spills: instructions that read or write a thread's local memory.
        tensor_core: instructions that use the tensor cores.
    """

    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    tensor_core: int


def variants(arch: int) -> Iterator[configs.Variant]:
    """Every kernel with every config of an architecture's table."""
    for name in MODULES:
        yield from importlib.import_module(f"wise_ext.triton_kernels.{name}").variants(arch)


def label(variant: configs.Variant) -> str:
    """A name that tells a variant from all others of its architecture."""
    blocks = "-".join(f"{name.removeprefix('BLOCK_')}{n}" for name, n in blocks_of(variant).items())
    config = variant.config
    return (
        f"{variant.name}-{dtype(variant)}-{blocks}-{config.num_warps}w{config.num_stages}s".lower()
    )


def blocks_of(variant: configs.Variant) -> dict[str, int]:
    """The config's blocks and the kernel's own choices: all that is neither stride nor pointer."""
    own = {key: int(value) for key, value in variant.constants.items() if key.isupper()}
    return {**own, **variant.config.blocks}


def dtype(variant: configs.Variant) -> str:
    """The narrowest floating point type the kernel points at: the activations' own."""
    found = {kind.strip("*").partition(":")[0] for kind in variant.signature.values()}
    return next((name for name in ("bf16", "fp16") if name in found), "fp32")


def compile_variant(variant: configs.Variant, arch: int) -> Resources:
    """Compile for a real architecture and look into the machine code."""
    constants = {**variant.config.blocks, **variant.constants}
    names = variant.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind, _, multiple = variant.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    missing = [name for name in names if (name in constants) == (name in variant.signature)]
    if missing:
        raise ValueError(f"{variant.name}: not exactly one of signature and constants: {missing}")
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=variant.config.options,
    )
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared, TENSOR_CORE[arch])


def complaint(variant: configs.Variant, arch: int) -> str:
    """What keeps a variant from being fast, or from being launched at all; empty for a good one."""
    found = compile_variant(variant, arch)
    if found.stack_bytes or found.spills:
        return f"{found.stack_bytes} bytes of stack, {found.spills} spills"
    if found.shared_bytes > SHARED_BYTES[arch]:
        return f"{found.shared_bytes} bytes of shared memory, {SHARED_BYTES[arch]} are the most"
    if variant.dot and found.tensor_core == 0:
        return f"no {TENSOR_CORE[arch]}: its products miss the tensor cores"
    return ""


def _inspect(cubin: bytes, shared: int, tensor_core: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        usage, listing = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "--dump-sass"))
    finally:
        os.unlink(file.name)
    instructions = _INSTRUCTION.findall(listing)
    return Resources(
        registers=_figure("REG", usage),
        shared_bytes=shared,
        stack_bytes=_figure("STACK", usage),
        spills=sum(name in ("LDL", "STL") for name in instructions),
        tensor_core=instructions.count(tensor_core),
    )


def _cuobjdump(flag: str, path: str) -> str:
    command = [str(CUOBJDUMP), flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _figure(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump told no {name}: {usage.strip()}")
    return int(found[1])


def rows() -> Iterator[dict[str, object]]:
    """One row a kernel, in the order of the tables."""
    for arch in ARCHITECTURES:
        for variant in variants(arch):
            yield {
                "kernel": variant.name,
                "arch": arch,
                "dtype": dtype(variant),
                "blocks": blocks_of(variant),
                "num_warps": variant.config.num_warps,
                "num_stages": variant.config.num_stages,
                **asdict(compile_variant(variant, arch)),
                "triton": triton.__version__,
            }


def main() -> None:
    """Write the table anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    if configs.INTERPRETED:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    lines = [json.dumps(row) + "\n" for row in rows()]
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(lines)} kernels")


if __name__ == "__main__":
    main()
