"""Memories to and from folders and a hub on loopback: whole, verified, with a card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from typer.testing import Result

from tests.integrations.fake_hub import Hub
from wise_ext.editing.edits import Edit
from wise_ext.errors import StorageError
from wise_ext.integrations.card import edits_table
from wise_ext.integrations.hub import local_folder, memory_card, pull, push
from wise_ext.memory import SideMemory
from wise_ext.storage import load_memory_dir, verify

Run = Callable[..., Result]
FILES = ["edits.jsonl", "side_memory.safetensors", "wise_config.json"]


@pytest.fixture
def directory(memory: SideMemory, saved: Any, tmp_path: Path) -> Path:
    return Path(saved(memory, tmp_path / "memory"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().serving() as hub:
        monkeypatch.setattr("wise_ext.integrations.hub.HfApi", partial(HfApi, endpoint=hub.url))
        yield hub


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.engine("hub", "push and pull, a folder")
def test_a_folder_there_and_back(run: Run, directory: Path, tmp_path: Path) -> None:
    shared, back = tmp_path / "shared" / "edits", tmp_path / "back"
    answer = run("push", directory, shared)
    assert answer.exit_code == 0, answer.output
    assert names(shared) == ["README.md", *FILES]
    answer = run("pull", shared, back)
    assert answer.exit_code == 0 and "4 edits" in answer.output, answer.output
    assert contents(back) == contents(directory) == contents(shared)
    assert all(check.ok for check in verify(back))
    # With the card beside it, it is a memory like any other.
    assert load_memory_dir(back).checksum == load_memory_dir(directory).checksum


def test_a_later_push_replaces_the_memory_as_one(
    directory: Path, memory: SideMemory, saved: Any, tmp_path: Path
) -> None:
    shared = str(tmp_path / "shared")
    push(directory, shared)
    first = (tmp_path / "shared" / "README.md").read_bytes()
    memory.radius = 0.5
    push(saved(memory, tmp_path / "later"), shared, report={"n": 4})
    assert contents(tmp_path / "shared") == contents(tmp_path / "later")
    assert (tmp_path / "shared" / "README.md").read_bytes() != first
    assert names(tmp_path / "shared") == ["README.md", *FILES]


@pytest.mark.engine("hub", "push and pull, a hub")
def test_a_hub_there_and_back(run: Run, hub: Hub, directory: Path, tmp_path: Path) -> None:
    answer = run("push", directory, "team/edits")
    assert answer.exit_code == 0, answer.output
    assert sorted(hub.repos["team/edits"]) == ["README.md", *FILES]
    assert len(hub.commits) == 1 and hub.created["team/edits"]["visibility"] == "private"
    answer = run("pull", "team/edits", tmp_path / "back")
    assert answer.exit_code == 0, answer.output
    assert contents(tmp_path / "back") == contents(directory)
    assert names(tmp_path / "back") == ["README.md", *FILES]


def test_what_the_hub_holds_is_verified_before_it_appears(
    run: Run, hub: Hub, directory: Path, tmp_path: Path
) -> None:
    push(directory, "team/edits")
    data = bytearray(hub.repos["team/edits"]["side_memory.safetensors"])
    data[-1] ^= 1
    hub.repos["team/edits"]["side_memory.safetensors"] = bytes(data)
    answer = run("pull", "team/edits", tmp_path / "new" / "back")
    assert answer.exit_code == 2 and "team/edits is no sound memory" in answer.stderr
    assert not (tmp_path / "new").exists()
    del hub.repos["team/edits"]["wise_config.json"]
    with pytest.raises(StorageError, match="is no sound memory"):
        pull("team/edits", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_repository_that_is_not_there_costs_one_line(run: Run, hub: Hub, tmp_path: Path) -> None:
    answer = run("pull", "team/nothing", tmp_path / "back")
    assert answer.exit_code == 2 and answer.stderr.startswith("error: cannot pull team/nothing")
    assert answer.stderr.count("\n") == 1 and not (tmp_path / "back").exists()


def test_a_hub_that_is_down_costs_one_line(
    run: Run, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = partial(HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("wise_ext.integrations.hub.HfApi", nowhere)
    answer = run("push", directory, "team/edits")
    assert answer.exit_code == 2 and answer.stderr.startswith("error: cannot push to team/edits")
    assert answer.stderr.count("\n") == 1


def test_damage_is_not_pushed(directory: Path, tmp_path: Path) -> None:
    with (directory / "edits.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(StorageError, match=r"is no sound memory: edits\.jsonl"):
        push(directory, str(tmp_path / "shared"))
    assert not (tmp_path / "shared").exists()


def test_other_folders_are_left_alone(directory: Path, tmp_path: Path) -> None:
    for folder in ("target", "back"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("keep")
    with pytest.raises(StorageError, match="holds something else"):
        push(directory, str(tmp_path / "target"))
    with pytest.raises(StorageError, match="is not empty"):
        pull(str(directory), tmp_path / "back")
    assert names(tmp_path / "target") == names(tmp_path / "back") == ["mine.txt"]
    with pytest.raises(StorageError, match="has no revision 'v1'"):
        pull(str(directory), tmp_path / "new", revision="v1")


def test_what_is_a_folder_and_what_a_repository(tmp_path: Path) -> None:
    assert local_folder("team/edits") is None
    for path in ("/srv/edits", "./edits", "../a/b", "~/edits", "edits", "a/b/c", str(tmp_path)):
        assert local_folder(path) is not None


def test_the_card_says_what_is_in_it(
    run: Run, directory: Path, facts: list[Edit], tmp_path: Path
) -> None:
    report = {"n": 4, "reliability": 0.75, "generation": {"contains": None}, "details": [{}]}
    (tmp_path / "eval.json").write_text(json.dumps(report))
    answer = run("push", directory, tmp_path / "s", "--eval", tmp_path / "eval.json")
    assert answer.exit_code == 0, answer.output
    card = (tmp_path / "s" / "README.md").read_text("utf-8")
    _, head, text = card.split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta["library_name"] == "wise-ext" and "knowledge-editing" in meta["tags"]
    stored = load_memory_dir(directory)
    for said in (stored.base["fingerprint"], *(f.prompt for f in facts), "| reliability | 0.750 |"):
        assert said in text
    assert "details" not in text and "| generation.contains | - |" in text
    (tmp_path / "eval.json").write_text("[]")
    answer = run("push", directory, tmp_path / "t", "--eval", tmp_path / "eval.json")
    assert answer.exit_code == 2 and "is no report" in answer.stderr


def test_the_base_model_is_named_where_a_hub_can_know_it(directory: Path) -> None:
    stored = load_memory_dir(directory)
    for name, said in (("org/model", "org/model"), ("smollm2", None), ("/tmp/model", None)):
        stored.base["name"] = name
        head = memory_card(stored, "team/edits").split("---\n")[1]
        assert yaml.safe_load(head).get("base_model") == said


def test_a_cell_stays_a_cell_and_long_tables_end() -> None:
    entry = {"id": "a|b", "prompt": "one\ntwo | `three`", "target": "x" * 300}
    lines = edits_table([entry] * 130).splitlines()
    assert lines[2].startswith("| a\\|b | one two \\| \\`three\\` | xxx")
    assert len(lines[2]) < 150 and len(lines) == 104 and lines[-1] == "… and 30 more."
