from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wise_ext.storage import Journal, verify
from wise_ext.storage.commit import CONFIG, LEDGER, TENSORS

MakeExample = Callable[..., Any]


def _failures(directory: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(directory) if not check.ok}


@pytest.mark.parametrize("options", [{}, {"keyed": False}, {"shards": 0}])
def test_a_good_directory_passes(
    make_example: MakeExample, tmp_path: Path, options: dict[str, Any]
) -> None:
    make_example(**options).save(tmp_path)
    checks = verify(tmp_path)
    assert all(check.ok and check.detail for check in checks)
    assert [check.name for check in checks] == [
        CONFIG,
        TENSORS,
        LEDGER,
        "shards",
        "ledger",
        "keys",
        "ledger and shards agree",
        "journal",
    ]


def test_damage_is_named_and_the_rest_still_checked(example: Any, tmp_path: Path) -> None:
    example.save(tmp_path)
    (tmp_path / LEDGER).write_bytes(b"")
    assert list(_failures(tmp_path)) == [LEDGER]
    assert "shards" in [check.name for check in verify(tmp_path)]
    (tmp_path / TENSORS).unlink()
    assert list(_failures(tmp_path)) == [TENSORS, LEDGER]
    (tmp_path / CONFIG).write_text("{}")
    assert list(_failures(tmp_path)) == [CONFIG]
    assert list(_failures(tmp_path / "nowhere")) == [CONFIG]


def test_ledger_and_shards_must_agree(make_example: MakeExample, tmp_path: Path) -> None:
    example = make_example()
    example.ledger[0]["shard"] = 1
    example.save(tmp_path)
    assert "absent from their shard: édit-0-0-0" in _failures(tmp_path)["ledger and shards agree"]
    example = make_example()
    del example.ledger[3]
    example.save(tmp_path)
    assert "absent from the ledger: édit-0-1-1" in _failures(tmp_path)["ledger and shards agree"]
    example = make_example()
    # An edit that a later one replaced stays in the ledger, in no shard.
    example.ledger.append(example.ledger[0] | {"id": "older", "shard": None})
    example.save(tmp_path)
    assert _failures(tmp_path) == {}


def test_ledger_lines_must_be_complete_and_unique(
    make_example: MakeExample, tmp_path: Path
) -> None:
    example = make_example()
    del example.ledger[1]["iterations"], example.ledger[1]["step"]
    example.save(tmp_path)
    assert "line 2 lacks step, iterations" in _failures(tmp_path)["ledger"]
    example = make_example()
    example.ledger.append(example.ledger[2])
    example.save(tmp_path)
    assert "twice: édit-0-1-0" in _failures(tmp_path)["ledger"]


def test_keys_must_point_home(make_example: MakeExample, tmp_path: Path) -> None:
    example = make_example()
    example.memory.key_index.shards[0] = 1
    example.save(tmp_path)
    assert "do not hold their edits: édit-0-0-0" in _failures(tmp_path)["keys"]
    example = make_example()
    example.memory.key_index.remove("édit-0-1-0")
    example.save(tmp_path)
    assert "without a key, which no prompt can reach: édit-0-1-0" in _failures(tmp_path)["keys"]


@pytest.mark.parametrize("name", ["mean", "scale"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_keys_are_compared_through_must_be_finite(
    example: Any, tmp_path: Path, name: str, value: float
) -> None:
    getattr(example.memory.key_index, name)[3] = value
    example.save(tmp_path)
    assert list(_failures(tmp_path)) == ["keys"]
    assert "numbers that are not finite" in _failures(tmp_path)["keys"]


def test_keys_are_counted(make_example: MakeExample, tmp_path: Path) -> None:
    make_example().save(tmp_path)
    details = {check.name: check.detail for check in verify(tmp_path)}
    assert details["keys"] == "4 edits by 12 keys of 80 numbers"


def test_values_must_be_finite(example: Any, tmp_path: Path) -> None:
    example.memory.shards[1].values[3] = torch.inf
    example.save(tmp_path)
    assert "shard 1 holds values that are not finite" in _failures(tmp_path)["shards"]


def test_many_names_are_shortened(make_example: MakeExample, tmp_path: Path) -> None:
    example = make_example(shards=4)
    example.ledger.clear()
    example.save(tmp_path)
    assert _failures(tmp_path)["ledger and shards agree"].endswith("and 3 more")


def test_unfinished_runs_are_reported(example: Any, tmp_path: Path) -> None:
    example.save(tmp_path)
    journal = Journal.open(tmp_path, {}, {})
    journal.record({}, {"t": torch.zeros(3)})
    # Verifying neither needs nor takes the lock.
    last = verify(tmp_path)[-1]
    assert last == ("journal", True, "an unfinished run of 1 steps: continue it with --resume")
    journal.close()
    (tmp_path / "journal" / "state-000000.safetensors").unlink()
    assert "damaged or missing" in _failures(tmp_path)["journal"]
