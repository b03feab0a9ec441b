from __future__ import annotations

import json
from pathlib import Path

import pytest

from wise_ext import NativeError, __version__, diagnostics, ops
from wise_ext._build_info import read_build_info


def test_report_is_json_and_complete() -> None:
    report = diagnostics.collect()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["wise_ext"] == __version__
    assert report["native"]["loaded"] == ops.native_loaded()
    assert set(report["ops"]) == set(ops.OPS)
    for op, devices in report["ops"].items():
        assert set(devices) == {"cpu", "cuda"}
        for device, choice in devices.items():
            assert choice["backend"] == ops.backend(op, device)
            assert choice["why"]


def test_rendering_shows_every_op_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    text = diagnostics.render(diagnostics.collect())
    for word in ("versions", "machine", "build", "native module", "operations", *ops.OPS):
        assert word in text
    assert max(map(len, text.splitlines())) <= 200


def test_the_choice_in_force_is_what_is_shown() -> None:
    before = ops.get_backend()
    ops.set_backend("reference")
    try:
        report = diagnostics.collect()
    finally:
        ops.set_backend(before)
    whys = {choice["why"] for devices in report["ops"].values() for choice in devices.values()}
    assert whys == {"the torch reference was chosen"}


def test_an_unavailable_explicit_choice_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: str, device: str, rows: int = 1) -> str:
        raise NativeError(f"no {op} for {device}: choose auto")

    monkeypatch.setattr(ops, "backend", refuse)
    report = diagnostics.collect()
    assert report["ops"]["pack"]["cuda"] == {
        "backend": "none",
        "why": "no pack for cuda: choose auto",
    }


def test_build_info_file(tmp_path: Path) -> None:
    file = tmp_path / "_build_info.json"
    assert "never built" in read_build_info(file).reasons[0]
    file.write_text('{"kind": "CPU", "reasons": ["no nvcc"], "warn": false}')
    assert read_build_info(file).kind == "CPU"
    assert read_build_info(file).reasons == ("no nvcc",)
    file.write_text("{")
    assert "cannot be read" in read_build_info(file).reasons[0]
    file.write_text("[]")
    assert read_build_info(file).kind == "unknown"
