"""What ptxas says each CUDA kernel takes: registers, shared memory, stack, spills. No card needed.

`python -m bench.cuda_resources` compiles every .cu for the architectures of the default build and
writes one row a kernel and architecture to bench/results/cuda-resources.jsonl. What was compiled is
kept in build/cuda-resources by the hash of all that goes into it, so a second run is quick;
tests/cuda/test_resources.py holds the same rows against the rules.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from wise_ext import _build_plan as build_plan

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "cuda-resources"
RESULTS = ROOT / "bench" / "results" / "cuda-resources.jsonl"
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))

_FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r"(?:ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*)\n)?"
)


@cache
def compiler() -> str | None:
    """nvcc, where there is one."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@cache
def toolkit() -> str:
    """The toolkit's version, such as 13.0.88."""
    text = subprocess.run([compiler() or "nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", text.stdout)
    return found[1] if found else "unknown"


def flags() -> list[str]:
    """As CMakeLists.txt compiles, machine code of the default architectures only."""
    every = build_plan.gencode_flags(build_plan.DEFAULT_CUDA_ARCHS)
    machine = [flag for flag in every if "code=sm_" in flag]
    return ["-std=c++17", "-O3", *(part for flag in machine for part in ("-gencode", flag))]


def rows(source: Path) -> list[dict[str, Any]]:
    """One row for each kernel and architecture of a file; compiles it unless it already was."""
    digest = hashlib.sha256(f"{toolkit()} {flags()} {source.name}".encode())
    for path in [source, *sorted(ROOT.glob("kernels/*.h")), *sorted(ROOT.glob("kernels/cuda/*h"))]:
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source.stem}-*"):
            old.unlink()
        kept.write_text(json.dumps(list(_compiled(source))), encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def _compiled(source: Path) -> Iterator[dict[str, Any]]:
    # Defined by the build; their values change nothing here.
    unused = ['-DWISE_CUDA_ARCHS=""', '-DWISE_CUDA_TOOLKIT=""']
    command = [compiler() or "nvcc", *flags(), *unused, f"-I{ROOT}", "-Xptxas", "-v"]
    # A fatbin holds the device's code alone: the host's half would take as long again.
    command += ["--fatbin", str(source), "-o", "/dev/null"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{answer.stderr[:4000]}")
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", answer.stderr)[1:]:
        arch = re.search(r"for '(sm_\w+)'", entry)
        assert arch is not None
        for match in _FUNCTION.finditer(entry):
            rest = match["rest"] or ""
            shared = re.search(r"(\d+) bytes smem", rest)
            yield {
                "kernel": _readable(match["name"]),
                "file": source.name,
                "arch": arch[1],
                "registers": int(match["registers"] or 0),
                "static_shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": int(match["stack"]),
                "spill_bytes": int(match["stores"]) + int(match["loads"]),
                "nvcc": toolkit(),
            }


def _readable(symbol: str) -> str:
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if filt is None:
        return symbol
    name = subprocess.run([filt, symbol], capture_output=True, text=True, check=True).stdout.strip()
    # Without the parameters, and without the namespaces everything here lives in.
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return name.split("(")[0].replace("wise::cuda::", "").replace("wise::", "")


def main() -> int:
    """Write the rows of every file."""
    if compiler() is None:
        print("there is no nvcc on this machine", file=sys.stderr)
        return 1
    lines = [json.dumps(row) for source in SOURCES for row in rows(source)]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} rows in {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
