"""`python -m bench.compare --base REV`: the same cases on another revision and here, in turns.

The other revision is checked out into a temporary git worktree and built there. Both sides are
measured by this revision's bench code, each in its own process, one sample of the one and one of
the other, so that a machine that changes its mind does so to both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import typer

from bench import cases, options, registry
from bench.cases import Case
from bench.rows import ROOT, append, commit_of
from bench.timing import percentile
from wise_ext.cli import console

# What changes most often; anything else is asked for.
DEFAULT = cases.Filter(
    shapes=("smollm2-135m",),
    rows=(1, 8),
    shards=(1,),
    dtypes=("fp32", "bf16"),
    variants=("all", "adam"),
)
DEFAULT_PROVIDERS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Ratio:
    """Base's time over here's, round by round: above 1, here is faster."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words; nothing while the spread (p20 to p80) holds 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else ""


def ratio(base: Sequence[float], here: Sequence[float]) -> Ratio:
    """From paired samples, seconds."""
    found = [old / new for old, new in zip(base, here, strict=True)]
    return Ratio(*(percentile(found, share) for share in (0.5, 0.2, 0.8)))


@contextmanager
def worktree(revision: str, device: str) -> Iterator[Path]:
    """A temporary checkout of a revision, its native module built for a device; gone afterwards.

    Raises:
        RuntimeError: git does not know the revision, or it does not build.
    """
    with tempfile.TemporaryDirectory(prefix="wise-ext-base-") as folder:
        target = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        _do([*git, "add", "--detach", str(target), revision], f"cannot check out {revision}")
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            # CUDA kernels take minutes that a comparison on the CPU does not need.
            environment = {"WISE_CUDA": "0", **os.environ} if device == "cpu" else None
            _do(build, f"{revision} does not build", target, environment)
            yield target
        finally:
            subprocess.run([*git, "remove", "--force", str(target)], check=False)


def _do(
    command: list[str],
    complaint: str,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    answer = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if answer.returncode:
        last = next(filter(None, reversed(answer.stdout.strip().splitlines())), "it said nothing")
        raise RuntimeError(f"{complaint}: {last}")


class Worker:
    """`bench.compare_worker` with the package of one source tree."""

    def __init__(self, tree: Path, device: str, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare_worker", str(tree), device, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """One question, one answer.

        Raises:
            RuntimeError: the worker has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its end of file says the same below
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What a dead worker was not told is still in the buffer, and closing sends it.
                with suppress(BrokenPipeError):
                    pipe.close()


def compare(base: Worker, here: Worker, case: Case, provider: str, rounds: int) -> dict[str, Any]:
    """A row: the ratio and both sides' samples; or `absent`, why a side has none."""
    row: dict[str, Any] = {**case.to_json(), "provider": provider}
    for name, worker in (("base", base), ("here", here)):
        answer = worker.ask(prepare=case.to_json(), provider=provider)
        if "failure" in answer:
            return {**row, "absent": f"{name}: {answer['failure']}"}
    samples: dict[str, list[float]] = {"base": [], "here": []}
    for number in range(rounds):
        sides = [("base", base), ("here", here)]
        # Whoever comes second finds a warmer machine: take turns in that too.
        for name, worker in sides if number % 2 == 0 else reversed(sides):
            answer = worker.ask(sample=True)
            if "failure" in answer:
                return {**row, "absent": f"{name}: {answer['failure']}"}
            samples[name].append(answer["seconds"])
    found = ratio(samples["base"], samples["here"])
    times = {f"{name}_us": percentile(each, 0.5) * 1e6 for name, each in samples.items()}
    return {**row, **times, "ratio": found.median, "low": found.low, "high": found.high}


def main(
    base: Annotated[str, typer.Option(metavar="REV", help="The revision to compare with.")],
    device: options.Device = options.DeviceName.cpu,
    op: options.Ops = None,
    provider: options.Providers = None,
    shape: options.Shapes = None,
    rows: options.Rows = None,
    shards: options.Shards = None,
    dtype: options.Dtypes = None,
    variant: options.Variants = None,
    json: options.Json = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each side.")] = 15,
    threads: options.Threads = 1,
) -> None:
    """Ratios of another revision's times to ours: above 1, ours is faster."""
    options.prepare(device.value, threads)
    options.check_words("provider", provider, registry.PROVIDERS)
    wanted = options.wanted(op, shape, rows, shards, dtype, variant)
    chosen = cases.choose(device.value, "full", DEFAULT if wanted.empty else wanted)
    providers = provider or DEFAULT_PROVIDERS[device.value]
    pairs = [
        (case, name)
        for case in chosen
        for name in providers
        if name in registry.OURS and registry.OPS[case.op].ours is not None
    ]
    if not pairs:
        console.complain("nothing of ours to compare: choose other ops or providers")
        raise typer.Exit(1)
    try:
        found = _compare_all(base, device.value, pairs, rounds, threads)
    except RuntimeError as error:
        console.complain(str(error))
        raise typer.Exit(1) from error
    if json:
        append(json, found)


def _compare_all(
    revision: str, device: str, pairs: list[tuple[Case, str]], rounds: int, threads: int
) -> list[dict[str, Any]]:
    found = []
    with (
        worktree(revision, device) as tree,
        Worker(tree, device, threads) as base,
        Worker(ROOT, device, threads) as here,
    ):
        origin = {"base": commit_of(tree), "here": commit_of(ROOT), "device": device}
        for case, provider in pairs:
            found.append({**compare(base, here, case, provider, rounds), **origin})
    console.table(
        f"{revision} ({origin['base']}) over here ({origin['here']})",
        ("case", "provider", "base µs", "here µs", "ratio", "p20-p80", ""),
        map(_line, found),
        right=("base µs", "here µs", "ratio", "p20-p80"),
    )
    return found


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    label = Case.from_json(row).label
    if "absent" in row:
        return (label, row["provider"], "-", "-", "-", "-", row["absent"])
    times = f"{row['base_us']:.1f}", f"{row['here_us']:.1f}"
    found = Ratio(row["ratio"], row["low"], row["high"])
    spread = f"{found.low:.2f}-{found.high:.2f}"
    return (label, row["provider"], *times, f"{found.median:.2f}", spread, found.verdict)


if __name__ == "__main__":
    typer.run(main)
