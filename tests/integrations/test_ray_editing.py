"""Parts trained by the processes of a real, local Ray cluster: the same memory, to the byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import wise_ext
from tests.editing.facts import QUICK, edits_of, same_files
from wise_ext import Edit, Editor, WiseConfig
from wise_ext.cli.app import app
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.errors import ModelError
from wise_ext.integrations import ray_editing
from wise_ext.storage import Journal, verify

TOLD = edits_of("a b c a2 d e")
# Two full parts, the second one with a guest, and one that stays open; one of several steps.
PARTED: dict[str, Any] = {"shard_size": 3, "batch_size": 2} | QUICK
LONG = [
    Edit("poem", "Recite the poem of the Bex ferry.", "Row, Bex, row,\nthe river is slow."),
    Edit("song", "Sing the song of Telm.", "Down by the mill the water is still."),
]
PASSAGES = AnyEditConfig(margin=1.0)
# Every worker is a process that loads torch, transformers and a model.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster of two processors for all tests that need one."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Else workers give way to whatever else runs here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def load(model_dir: Path) -> Any:
    return partial(wise_ext.load_model, str(model_dir))


def _run(load: Any, folder: Path, told: list[Edit] = TOLD, **how: Any) -> Editor:
    """An editing run on the cluster where ``how`` says who trains there."""
    config = how.pop("config", WiseConfig(**PARTED))
    editor = Editor(*load(), config, folder, how.pop("resume", False), PASSAGES)
    workers = how.pop("workers", None)
    if how.pop("ray", False):
        ray_editing.edit(editor, told, load, None, workers, progress=False, **how)
    else:
        editor.edit(told, progress=False, **how)
    return editor


@pytest.mark.engine("Ray", "edit, to the same bytes")
def test_on_the_cluster_to_the_same_bytes(cluster: None, load: Any, tmp_path: Path) -> None:
    """Short edits with a guest and an open part, then passages, then short ones again."""
    for name in ("here", "there"):
        _run(load, tmp_path / name, ray=name == "there", workers=2)
        _run(load, tmp_path / name, LONG, ray=name == "there", workers=1, method="anyedit")
        more = [Edit("f", "Who owns the Vask inn?", "Ottil")]
        editor = _run(load, tmp_path / name, more, ray=name == "there", workers=1)
        assert len(editor.memory.shards) == 6
    assert same_files(tmp_path / "here", tmp_path / "there")
    assert all(check.ok for check in verify(tmp_path / "there"))


@pytest.mark.engine("Ray", "a worker killed")
def test_a_killed_worker_costs_nothing_but_time(cluster: None, load: Any, tmp_path: Path) -> None:
    _run(load, tmp_path / "here")
    killed: list[int] = []
    watcher = threading.Thread(target=_kill_one_in_training, args=(killed,))
    watcher.start()
    _run(load, tmp_path / "there", ray=True, workers=2)
    watcher.join()
    assert len(killed) == 1
    assert same_files(tmp_path / "here", tmp_path / "there")


def _kill_one_in_training(killed: list[int]) -> None:
    """SIGKILL to a process of ours that is training."""
    deadline = time.monotonic() + 120
    while not killed and time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if _title(pid) == "ray::EditingWorker.train" and os.getpid() in _ancestors(pid):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
        time.sleep(0.01)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode().strip()
    except OSError:
        return ""


def _ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


_KILLED_DRIVER = """
import os, signal, sys
from functools import partial
import torch
torch.set_num_threads(1)
import wise_ext
from tests.integrations.test_ray_editing import PASSAGES, PARTED, TOLD
from wise_ext.integrations import ray_editing
from wise_ext.storage import Journal

record = Journal.record
def record_two(self, *args):
    record(self, *args)
    if self.num_steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.record = record_two
load = partial(wise_ext.load_model, sys.argv[1])
config = wise_ext.WiseConfig(**PARTED)
editor = wise_ext.Editor(*load(), config, sys.argv[2], anyedit=PASSAGES)
ray_editing.edit(editor, TOLD, load, progress=False, workers=2)
"""


@pytest.mark.engine("Ray", "the driver killed, and resumed")
def test_a_killed_driver_goes_on_with_and_without_a_cluster(
    cluster: None, load: Any, model_dir: Path, tmp_path: Path
) -> None:
    _run(load, tmp_path / "here")
    command = [sys.executable, "-c", _KILLED_DRIVER, str(model_dir), str(tmp_path / "alone")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    shutil.copytree(tmp_path / "alone", tmp_path / "again")
    for name in ("alone", "again"):
        assert Journal.exists(tmp_path / name)
        editor = _run(load, tmp_path / name, resume=True, ray=name == "again", workers=1)
        assert len(editor.ledger) == len(TOLD)
        assert same_files(tmp_path / "here", tmp_path / name)


def test_what_a_worker_raises_comes_through(cluster: None, load: Any, tmp_path: Path) -> None:
    editor = Editor(*load(), WiseConfig(**PARTED), tmp_path / "m")
    lost = partial(wise_ext.load_model, "/nowhere/to/be/found")
    with pytest.raises(ModelError, match="no such directory: /nowhere/to/be/found"):
        ray_editing.edit(editor, TOLD, lost, progress=False, workers=1)
    assert Journal.exists(tmp_path / "m")


def test_a_worker_unlike_the_driver_is_refused(
    cluster: None, load: Any, model_dir: Path, tmp_path: Path
) -> None:
    editor = Editor(*load(), WiseConfig(**PARTED), tmp_path / "m")
    other = partial(wise_ext.load_model, str(model_dir), dtype="bf16")
    with pytest.raises(ray_editing.ClusterError, match="computes otherwise than this machine"):
        ray_editing.edit(editor, TOLD, other, progress=False)


def test_more_workers_than_fit_are_refused(cluster: None, load: Any) -> None:
    editor = Editor(*load(), WiseConfig(**PARTED))
    with pytest.raises(ray_editing.ClusterError, match="room for 2 workers of 1 threads each, not"):
        ray_editing.edit(editor, TOLD, load, workers=3)


def test_the_command(cluster: None, model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    lines = ({"id": e.id, "prompt": e.prompt, "target_new": e.target_new} for e in TOLD)
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    short = ["--layer", "2", "--shard-size", "3"]
    for name, more in (("here", []), ("there", ["--ray", "--ray-workers", "2"])):
        command = ["edit", str(model_dir), str(file), "--out", str(tmp_path / name)]
        result = CliRunner().invoke(app, [*command, *short, *more])
        assert result.exit_code == 0, result.output
    assert same_files(tmp_path / "here", tmp_path / "there")
