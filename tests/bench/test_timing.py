"""The clocks; those of a card run here on a stand-in for it that notes what is asked of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import timing
from bench.registry import Candidate

ROOT = Path(__file__).parents[2]


def candidate(
    call: Callable[[], object], provider: str = "torch", waits: bool = False
) -> Candidate:
    def run() -> tuple[torch.Tensor, ...]:
        call()
        return ()

    return Candidate(provider, run, "auto", not waits, False)


def test_percentiles_interpolate() -> None:
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert timing.percentile([5.0], 0.8) == 5.0


def test_candidates_take_turns() -> None:
    torch.set_num_threads(1)
    order: list[str] = []

    def busy(name: str) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            torch.ones(500_000).sum()

        return call

    both = [candidate(busy("a"), "a"), candidate(busy("b"), "b")]
    found = timing.measure(both, "cpu", 0.0)
    for samples in found.values():
        assert samples.clock == "process"
        assert len(samples.seconds) == timing.MIN_SAMPLES
        assert all(second > 0 for second in samples.seconds)
    # After the warm-up every sample of a is followed by one of b.
    samples = [name for number, name in enumerate(order) if name != order[number - 1]]
    assert samples[-2 * timing.MIN_SAMPLES :] == ["a", "b"] * timing.MIN_SAMPLES


def test_short_calls_are_timed_together_and_long_ones_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "LONG_SECONDS", 0.0)
    found = timing.measure([candidate(lambda: None)], "cpu", 1.0)["torch"]
    assert found.calls > 100
    assert len(found.seconds) == 1


def test_memory_of_a_call_is_its_peak() -> None:
    # In a process of its own: memory that an earlier test gave back would not show.
    code = (
        "import torch\n"
        "from bench import timing\n"
        "from tests.bench.test_timing import candidate\n"
        "print(timing.extra_memory(candidate(lambda: torch.ones(16 << 20)), 'cpu'))\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    if answer.stdout == "None\n":
        pytest.skip("this system does not count peaks")
    assert 60 << 20 < int(answer.stdout) < 150 << 20


class Card:
    """Notes flushes, events and calls; times are how many notes lie between two events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.capturing = False
        card = self

        class Event:
            def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
                assert enable_timing
                self._external = external

            def record(self) -> None:
                assert self._external == card.capturing
                self._at = len(card.log)
                card.log.append("event")

            def elapsed_time(self, end: Event) -> float:
                return float(end._at - self._at)

        class Stream:
            def wait_stream(self, other: object) -> None:
                assert not card.capturing

        class Graph:
            def replay(self) -> None:
                card.log.append("replay")

        @contextmanager
        def graph(which: Graph) -> Iterator[None]:
            card.capturing = True
            try:
                yield
            finally:
                card.capturing = False

        @contextmanager
        def stream(which: Stream) -> Iterator[None]:
            yield

        def synchronize() -> None:
            assert not card.capturing

        for name, stand_in in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "stream": stream,
            "current_stream": Stream,
            "set_stream": lambda stream: card.log.append("stream"),
            "synchronize": synchronize,
            "_sleep": lambda cycles: card.log.append("sleep"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(timing, "_Flush", lambda: lambda: card.log.append("flush"))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def test_a_graph_empties_the_cache_before_each_timed_call(card: Card) -> None:
    found = timing.measure([candidate(lambda: card.log.append("call"))], "cuda", 0.0)["torch"]
    assert found.clock == "graph"
    # The call lies between the events, the flush outside.
    assert len(found.seconds) % timing.GRAPH_CALLS == 0
    assert set(found.seconds) == {2e-3}
    captured = card.log[3 : card.log.index("replay")]
    assert captured == ["flush", "event", "call", "event"] * timing.GRAPH_CALLS


def test_an_empty_interval_is_measured_like_a_call(card: Card) -> None:
    assert timing.event_floor() == 1e-3


def test_what_waits_for_the_device_is_launched_between_events(card: Card) -> None:
    waiting = candidate(lambda: card.log.append("call"), waits=True)
    found = timing.measure([waiting], "cuda", 0.0)["torch"]
    assert found.clock == "events"
    assert set(found.seconds) == {2e-3}
    assert card.log[3:8] == ["flush", "sleep", "event", "call", "event"]


def test_a_capture_that_fails_is_timed_by_events(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    def call() -> None:
        if card.capturing:
            raise RuntimeError("not permitted when a stream is capturing")

    found = timing.measure([candidate(call)], "cuda", 0.0)["torch"]
    assert found.clock == "events"
    assert "stream" in card.log  # the one from before the capture is set again
    assert "not permitted" in capsys.readouterr().err
