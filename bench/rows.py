"""Rows: one JSON object a line for every (case, provider), with where and how it was measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.cases import DTYPES, Case
from bench.timing import Samples, event_floor, percentile
from bench.work import Work
from wise_ext import ops
from wise_ext._version import __version__

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
_REPEATS = 10


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file; what a killed run has measured stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            short = {name: _rounded(value) for name, value in row.items()}
            file.write(json.dumps(short) + "\n")


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def make(
    case: Case,
    provider: str,
    samples: Samples,
    work: Work,
    roof: Roofline | None,
    error: float,
    extra_bytes: int | None,
) -> Row:
    """The figures of one provider of one case; times in microseconds.

    Without a roofline (dispatch: tiny tensors have no bandwidth to speak of) its figures are None.
    """
    p20, p50, p80 = (samples.percentile(share) for share in (0.2, 0.5, 0.8))
    return {
        **case.to_json(),
        "provider": provider,
        "d_out": case.d_out,
        "d_in": case.d_in,
        "p20_us": p20 * 1e6,
        "p50_us": p50 * 1e6,
        "p80_us": p80 * 1e6,
        "wall_p50_us": percentile(samples.wall or samples.seconds, 0.5) * 1e6,
        "clock": samples.clock,
        "samples": len(samples.seconds),
        "calls": samples.calls,
        "bytes": work.bytes,
        "flops": work.flops,
        "gbps": work.bytes / p50 / 1e9,
        "tflops": work.flops / p50 / 1e12,
        "error": error,
        "extra_bytes": extra_bytes,
        **(roof.figures(case.dtype, work, p50) if roof else dict.fromkeys(Roofline.FIGURES)),
    }


class Roofline:
    """What this machine does at best, measured in the same run: a copy, and a matmul a dtype.

    Attributes:
        copy: bytes read and written a second by a copy too large for any cache.
        matmul: operations a second of a square matmul, by dtype.
    """

    FIGURES = ("bound", "roofline_us", "roofline_share", "copy_gbps", "matmul_tflops")

    def __init__(self, device: str, dtypes: Iterable[str]) -> None:
        large, side = (1 << 30, 8192) if device == "cuda" else (256 << 20, 1024)
        source = torch.ones(large, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.copy = 2 * large / _median(lambda: target.copy_(source), device)
        self.matmul = {}
        for name in sorted(set(dtypes)):
            # Random: a product of zeros draws less power and runs faster.
            factor = torch.randn(side, side, device=device).to(DTYPES[name])
            seconds = _median(lambda factor=factor: factor @ factor, device)
            self.matmul[name] = 2 * side**3 / seconds

    def figures(self, dtype: str, work: Work, seconds: float) -> Row:
        """`FIGURES` of a call that took so long."""
        rates = self.copy, self.matmul[dtype]
        floor = work.seconds(*rates)
        found = work.bound(*rates), floor * 1e6, floor / seconds, rates[0] / 1e9, rates[1] / 1e12
        return dict(zip(self.FIGURES, found, strict=True))


def _median(call: Any, device: str) -> float:
    """Seconds of the median of several calls."""
    found = []
    for _ in range(_REPEATS):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        else:
            now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
            began = now()
            call()
            found.append(now() - began)
    return percentile(found, 0.5)


def homeless(word: str) -> str:
    """An argument without folders of this machine: absolute paths keep their last part."""
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if os.path.isabs(value) else value)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What was typed, folders of this machine left out."""
    return shlex.join(["python", "-m", module, *map(homeless, arguments)])


def provenance(device: str, command: str, commit: str | None = None) -> Row:
    """Where rows come from: machine, versions, commit, command."""
    found: Row = {
        "device": device,
        "command": command,
        "commit": commit or commit_of(ROOT),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "wise_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_isa": ops.cpu_isa(),
        # Of the minute before: a figure above the threads in use means company.
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "event_floor_us": event_floor() * 1e6,
        }
    return found


def commit_of(root: Path) -> str:
    """The commit of a checkout, "+changes" where files differ from it, recorded rows aside, which
    a run adds to itself; "unknown" outside git."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        whole = ["git", "-C", str(root), *command]
        return subprocess.run(whole, capture_output=True, text=True, check=False)

    try:
        commit = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)bench/results")
    except OSError:
        return "unknown"
    return commit + "+changes" * (changed.returncode == 1) if commit else "unknown"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
