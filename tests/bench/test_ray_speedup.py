"""What the bench of the cluster reports, on a tiny model."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from bench import ray_speedup
from bench.made_memory import questions
from wise_ext import models


@pytest.fixture
def load(model_dir: Path) -> Any:
    return partial(models.load_model, str(model_dir), device="cpu")


def test_made_facts_are_about_one_subject_each() -> None:
    one, two = ray_speedup.facts(40), ray_speedup.facts(40, seed=1)
    subjects = [edit.subject for edit in (*one, *two)]
    assert len(set(subjects)) == 80
    assert all(str(edit.subject) in edit.prompt for edit in one)
    assert [(e.prompt, e.subject) for e in one] == list(islice(questions(), 40))


def test_a_driver_plans_and_takes_beside_stored_edits(load: Any) -> None:
    few, many = (ray_speedup.driver(load, stored, step=5) for stored in (10, 2000))
    assert (few["stored"], many["stored"]) == (10, 2000)
    assert 0 < few["take_cpu_s"] < many["take_cpu_s"]
    assert few["shard_bytes"] == many["shard_bytes"] > 4 * 0.2 * 128 * 512
    assert 500 < few["key_bytes"] < 40_000


@pytest.mark.slow
def test_runs_take_turns_and_have_to_agree(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    rows = ray_speedup.runs(load, shards=2, edits_each=1, workers=2, rounds=1)
    assert [(row["workers"], row["shards"]) for row in rows] == [(0, 2), (2, 2)]
    alone, shared = rows
    assert alone["workers_cpu_s"] == 0 and alone["critical_cpu_s"] == alone["driver_cpu_s"]
    assert 0 < shared["critical_cpu_s"] < shared["workers_cpu_s"] + shared["driver_cpu_s"]

    def other(load: Any, config: Any, edits: Any, folder: Path, workers: int) -> dict[str, Any]:
        folder.mkdir()
        (folder / "edits.jsonl").write_text(folder.name)
        return {}

    monkeypatch.setattr(ray_speedup, "run", other)
    with pytest.raises(RuntimeError, match="0-0 and 0-2 differ"):
        ray_speedup.runs(load, shards=2, edits_each=1, workers=2, rounds=1)
