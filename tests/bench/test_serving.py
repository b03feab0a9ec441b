"""The bench of served models: its checks, by endpoints that answer at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from bench.serving import Answer, Endpoint, measure, served
from wise_ext.errors import WiseError


@dataclass
class Scripted(Endpoint):
    """An endpoint whose every answer is its prompt, but what the script says."""

    script: dict[str, list[str]] = field(default_factory=dict)

    def ask(self, prompt: str) -> Answer:
        told = self.script.get(prompt)
        return Answer(told.pop(0) if told else prompt, 3, 1.0 if prompt == "a" else 0.25)


def endpoint(name: str, **script: list[str]) -> Scripted:
    return Scripted(name, None, "m", 4, script)


def test_rows_of_both_servers() -> None:
    plain, edited = endpoint("plain"), endpoint("edited", a=["new"] * 7)
    rows = measure([plain, edited], ["a", "b", "c"], clients=2, rounds=6, seed=0)
    assert [row["server"] for row in rows] == ["plain", "edited"]
    assert [row["requests"] for row in rows] == [18, 18]
    for row in rows:
        assert row["alike"] == 2 / 3 and row["tokens_a_second"] > 0
        assert row["latency_seconds"] == {50: 0.25, 90: 1.0, 99: 1.0}
        assert row["latency_seconds_alike"] == {50: 0.25, 90: 0.25, 99: 0.25}


def test_another_answer_in_company_is_an_error() -> None:
    with pytest.raises(WiseError, match="plain answers 'a' differently in company: else"):
        measure([endpoint("plain", a=["a", "else"])], ["a", "b"], clients=2, rounds=1, seed=0)


def test_a_server_that_does_not_start() -> None:
    with (
        pytest.raises(WiseError, match="the server of x did not start"),
        served("x", "no/such/model", ["--memory", "/nowhere"], 4),
    ):
        pass
