"""Clocks. Candidates of a case take turns, so that what disturbs one disturbs all.

On the CPU: process time with one thread (another process on the core costs nothing then), wall
time with more. On a GPU: events around each call inside one CUDA graph, or around a launched call
where a graph cannot hold it, and the L2 cache emptied before each. For dispatch, the host's clock
over many calls, whatever the device.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.registry import Candidate

MIN_SAMPLES = 3
MAX_SAMPLES = 200
# One sample of short calls is many of them: clocks and processes need some time to be told apart.
SAMPLE_SECONDS = 2e-3
# A call as long as this is timed once.
LONG_SECONDS = 10.0
GRAPH_CALLS = 10
# Several times the L2 of any card so far (H200: 60 MB).
FLUSH_BYTES = 512 << 20
# Cycles for which the device is kept busy while the host queues the call: about a millisecond.
HEAD_START = 2_000_000


@dataclass
class Samples:
    """Seconds a call, one entry a sample.

    Attributes:
        clock: "process", "wall", "graph" or "events".
        calls: calls a sample.
        wall: wall seconds a call, where `clock` is another host clock.
    """

    clock: str
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Of `seconds`, interpolated."""
        return percentile(self.seconds, share)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values lie below, interpolated between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def measure(
    candidates: Sequence[Candidate], device: str, seconds: float, dispatch: bool = False
) -> dict[str, Samples]:
    """Time every candidate for about `seconds`, and return its samples by provider."""
    if device == "cuda" and not dispatch:
        return _measure_cuda(candidates, seconds)
    wall = device == "cuda" or torch.get_num_threads() > 1
    return _alternate(candidates, _HostClock(device, wall), seconds)


class _HostClock:
    def __init__(self, device: str, wall: bool) -> None:
        self.name = "wall" if wall else "process"
        self._device, self._wall = device, wall

    def time(self, call: Callable[[], object], calls: int) -> tuple[float, float]:
        """Seconds a call on this clock, and on the wall."""
        self._wait()
        wall, process = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        process, wall = time.process_time() - process, time.perf_counter() - wall
        self._wait()
        return (wall if self._wall else process) / calls, wall / calls

    def _wait(self) -> None:
        # After the clock too: dispatch is what the host does, and its queue must not fill up.
        if self._device == "cuda":
            torch.cuda.synchronize()


def _alternate(
    candidates: Sequence[Candidate], clock: _HostClock, seconds: float
) -> dict[str, Samples]:
    found: dict[str, Samples] = {}
    spent = dict.fromkeys((candidate.provider for candidate in candidates), 0.0)
    gc.collect()
    for candidate in candidates:
        with candidate.in_force() as call:
            took, wall = clock.time(call, 1)
            if took < SAMPLE_SECONDS:  # the first call warms up; short ones deserve another look
                took, wall = clock.time(call, 3)
        calls = min(1000, max(1, round(SAMPLE_SECONDS / max(took, 1e-7))))
        found[candidate.provider] = samples = Samples(clock.name, calls)
        if took >= LONG_SECONDS:  # the check has warmed it up: this is its sample
            samples.seconds.append(took)
            samples.wall.append(wall)
    waiting = [each for each in candidates if not found[each.provider].seconds]
    while waiting:
        for candidate in list(waiting):
            samples = found[candidate.provider]
            with candidate.in_force() as call:
                took, wall = clock.time(call, samples.calls)
            samples.seconds.append(took)
            samples.wall.append(wall)
            spent[candidate.provider] += wall * samples.calls
            if _enough(samples, spent[candidate.provider], seconds):
                waiting.remove(candidate)
    return found


def _enough(samples: Samples, spent: float, seconds: float) -> bool:
    count = len(samples.seconds)
    return count >= MAX_SAMPLES or (count >= MIN_SAMPLES and spent >= seconds)


class _Flush:
    """Empties the L2 by reading: a written buffer would leave lines that the call has to evict."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._sink = torch.empty((), dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        torch.amax(self._buffer, 0, out=self._sink)


class _GraphTimer:
    """A CUDA graph of `calls` times: flush, event, call, event."""

    clock = "graph"

    def __init__(self, candidate: Candidate, flush: Callable[[], None], calls: int) -> None:
        self._events = [(_event(True), _event(True)) for _ in range(calls)]
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with candidate.in_force() as call:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            # Collecting a compiled kernel during capture would unload it, which a capture forbids.
            collecting = gc.isenabled()
            gc.disable()
            try:
                with torch.cuda.graph(self._graph):
                    for start, end in self._events:
                        flush()
                        start.record()
                        call()
                        end.record()
            finally:
                if collecting:
                    gc.enable()

    def round(self) -> list[float]:
        """Replay once; seconds of every call."""
        self._graph.replay()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in self._events]


class _EventTimer:
    """Launched calls between events, queued behind a sleep that gives the host a head start."""

    clock = "events"

    def __init__(self, candidate: Candidate, flush: Callable[[], None], calls: int) -> None:
        self._candidate, self._flush, self._calls = candidate, flush, calls
        with candidate.in_force() as call:
            for _ in range(3):
                call()
        torch.cuda.synchronize()

    def round(self) -> list[float]:
        """Launch `calls` times; seconds of every call."""
        found = []
        with self._candidate.in_force() as call:
            for _ in range(self._calls):
                start, end = _event(), _event()
                self._flush()
                torch.cuda._sleep(HEAD_START)
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                found.append(start.elapsed_time(end) * 1e-3)
        return found


def _event(external: bool = False) -> torch.cuda.Event:
    # External: inside a graph it stays an event that can be read, instead of an edge.
    return torch.cuda.Event(enable_timing=True, external=external)


def _timer(
    candidate: Candidate, flush: Callable[[], None], calls: int
) -> _GraphTimer | _EventTimer:
    if candidate.capturable:
        stream = torch.cuda.current_stream()
        try:
            timer = _GraphTimer(candidate, flush, calls)
            timer.round()
            return timer
        except RuntimeError as error:
            # What the row's clock says; a provider that is said to be capturable should be.
            complaint = f"{candidate.provider}: timed by events, no CUDA graph: {error}"
            print(complaint, file=sys.stderr, flush=True)
            torch.cuda.set_stream(stream)  # a broken capture may leave its own
            torch.cuda.synchronize()
    return _EventTimer(candidate, flush, calls)


def _measure_cuda(candidates: Sequence[Candidate], seconds: float) -> dict[str, Samples]:
    flush = _Flush()
    timers = {each.provider: _timer(each, flush, GRAPH_CALLS) for each in candidates}
    found = {name: Samples(timer.clock) for name, timer in timers.items()}
    waiting, spent = dict(timers), dict.fromkeys(timers, 0.0)
    while waiting:
        for name, timer in list(waiting.items()):
            began = time.perf_counter()
            found[name].seconds += timer.round()
            spent[name] += time.perf_counter() - began
            if _enough(found[name], spent[name], seconds):
                del waiting[name]
    return found


def event_floor() -> float:
    """Seconds between two events of a graph with nothing between them: what every call carries."""
    nothing = Candidate("nothing", lambda: (), "auto", True, False)
    return percentile(_timer(nothing, _Flush(), GRAPH_CALLS).round(), 0.5)


def extra_memory(candidate: Candidate, device: str) -> int | None:
    """Bytes that one call needed at its peak beyond what was there before, its results included.

    On the CPU the kernel's own count of resident pages; None where it keeps none.
    """
    with candidate.in_force() as call:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        try:
            gc.collect()
            # Resets the high-water mark (man 5 proc).
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
            before = _resident("VmRSS")
            call()
            return max(0, _resident("VmHWM") - before)
        except OSError:
            return None


def _resident(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
