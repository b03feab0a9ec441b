"""``--ray``: how it is written, and when it is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wise_ext.cli.app import app
from wise_ext.cli.clusters import LOCAL, with_address
from wise_ext.integrations import ray_editing


def test_an_address_where_nobody_is() -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with (
        pytest.raises(ray_editing.ClusterError, match=r"answers at 127.0.0.1:9 \(.*refused"),
        ray_editing.Cluster("127.0.0.1:9"),
    ):
        pass


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ray_editing.ClusterError, match=r'pip install "wise-ext\[ray\]"'),
        ray_editing.Cluster(),
    ):
        pass


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("m e.jsonl --ray", f"m e.jsonl --ray {LOCAL}"),
        ("--ray m e.jsonl", f"--ray {LOCAL} m e.jsonl"),
        ("m e.jsonl --ray --out o", f"m e.jsonl --ray {LOCAL} --out o"),
        ("m e.jsonl --ray auto", "m e.jsonl --ray auto"),
        ("--ray head:6379 m e.jsonl", "--ray head:6379 m e.jsonl"),
        ("--ray [::1]:6379 m", "--ray [::1]:6379 m"),
        ("--ray ray://head:10001 m", "--ray ray://head:10001 m"),
        ("--ray=head:6379 m", "--ray=head:6379 m"),
        ("m -- --ray", "m -- --ray"),
        ("--ray -- m", f"--ray {LOCAL} -- m"),
    ],
)
def test_the_address_may_be_left_out(given: str, meant: str) -> None:
    assert with_address(given.split()) == meant.split()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray-workers", "2"], "--ray-workers is of --ray"),
        (["--ray", "--method", "memit"], "--ray is of a side memory"),
        (["--ray", "127.0.0.1:9", "--ray-workers", "2"], "no Ray cluster answers at 127.0.0.1:9"),
    ],
)
def test_the_command_refuses(
    model_dir: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "The colour of Ardo is", "target_new": "grey"}\n', encoding="utf-8")
    command = ["edit", str(model_dir), str(file), "--out", str(tmp_path / "m"), *more]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "m").exists()
