"""The decision table in docs/build.md, row by row, against wise_ext/_build_plan.py."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from wise_ext._build_plan import (
    DEFAULT_CUDA_ARCHS,
    Facts,
    PlanError,
    Settings,
    gencode_flags,
    make_plan,
    without_cuda,
    without_native,
)

DOCS = Path(__file__).parents[2] / "docs" / "build.md"
EVERYTHING = Facts(
    platform="linux",
    compiler="/usr/bin/c++",
    python_headers="/usr/include/python3.11",
    cmake="/usr/bin/cmake",
    ninja="/usr/bin/ninja",
    pybind11="/site/pybind11/include",
    torch="2.13.0+cpu",
)
MACHINES = {
    "everything and nvcc": replace(EVERYTHING, nvcc="/usr/local/cuda/bin/nvcc"),
    "everything but nvcc": EVERYTHING,
    "no C++ compiler": replace(EVERYTHING, compiler=None),
    "no Python.h": replace(EVERYTHING, python_headers=None),
    "no cmake": replace(EVERYTHING, cmake=None),
    "no ninja": replace(EVERYTHING, ninja=None),
    "no pybind11": replace(EVERYTHING, pybind11=None),
    "no torch": replace(EVERYTHING, torch=None, torch_problem="torch is not installed for py"),
    "torch older than 2.11": replace(EVERYTHING, torch="2.10.1"),
    "torch 3 or newer": replace(EVERYTHING, torch="3.0.0+cu130"),
    "not Linux": replace(EVERYTHING, platform="darwin"),
}
CURES = {
    "everything but nvcc": r"no nvcc \(install the CUDA toolkit",
    "no C++ compiler": r"no C\+\+ compiler was found \(install g\+\+",
    "no Python.h": r"Python\.h is absent \(install .*python3-dev",
    "no cmake": r"cmake is absent \(pip install cmake\)",
    "no ninja": r"ninja is absent \(pip install ninja\)",
    "no pybind11": r"pybind11 is absent \(pip install pybind11\)",
    "no torch": r"torch is not installed for py \(pip install 'torch>=2\.11,<3' first",
    "torch older than 2.11": r"torch 2\.10\.1 is not supported \(pip install 'torch>=2\.11,<3'",
    "torch 3 or newer": r"torch 3\.0\.0\+cu130 is not supported",
    "not Linux": r"on Linux only, and this is darwin",
}


def documented_rows() -> list[tuple[str, str, str, str]]:
    """(machine, WISE_NATIVE, WISE_CUDA, result), with every "any" spelled out."""
    section = DOCS.read_text(encoding="utf-8").split("### The decision table")[1]
    rows = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] in ("machine", "---"):
            continue
        machine, native, cuda, result = cells
        machines = list(MACHINES) if machine == "any of these" else [machine]
        cudas = ["auto", "0", "1"] if cuda == "any" else [cuda]
        rows += [(m, native, c, result) for m, c in itertools.product(machines, cudas)]
    return rows


ROWS = documented_rows()


def test_the_table_names_every_machine_and_repeats_no_row() -> None:
    assert {row[0] for row in ROWS} == set(MACHINES)
    assert len({row[:3] for row in ROWS}) == len(ROWS)
    for machine in ("everything and nvcc", "everything but nvcc"):
        settings = {row[1:3] for row in ROWS if row[0] == machine}
        assert settings == set(itertools.product(("auto", "0", "1"), repeat=2))


@pytest.mark.parametrize(("machine", "native", "cuda", "result"), ROWS)
def test_row(machine: str, native: str, cuda: str, result: str) -> None:
    facts, settings = MACHINES[machine], Settings(native=native, cuda=cuda)
    if result == "error":
        why = "contradicts WISE_NATIVE=0" if native == "0" else CURES[machine]
        with pytest.raises(PlanError, match=why):
            make_plan(facts, settings)
        return
    plan = make_plan(facts, settings)
    kind, _, warning = result.partition(", with a ")
    assert plan.kind == kind
    assert plan.warn == (warning == "warning")
    assert plan.cuda_strict == (cuda == "1" and plan.cuda)
    assert plan.native_strict == (plan.cpu and "1" in (native, cuda))
    if plan.warn:
        assert re.search(CURES[machine], plan.reasons[0])
    elif not plan.cuda:
        assert plan.reasons
    assert bool(plan.gencode) == plan.cuda


def test_everything_missing_is_named_at_once() -> None:
    bare = Facts("linux", None, None, None, None, None, None, torch_problem=None)
    with pytest.raises(PlanError) as caught:
        make_plan(bare, Settings(native="1"))
    for name in ("C++ compiler", "Python.h", "cmake", "ninja", "pybind11", "torch"):
        assert name in str(caught.value)
    assert str(caught.value).startswith("WISE_NATIVE=1, but")


@pytest.mark.parametrize("torch", ["2.11.0", "2.11.0+cu130", "2.13.0+cpu", "2.99.1"])
def test_supported_torch(torch: str) -> None:
    assert make_plan(replace(EVERYTHING, torch=torch), Settings()).cpu


@pytest.mark.parametrize("name", ["WISE_NATIVE", "WISE_CUDA"])
def test_a_setting_that_is_no_choice(name: str) -> None:
    with pytest.raises(PlanError, match=f"{name}='yes' is not a choice: use auto, 0 or 1"):
        make_plan(EVERYTHING, Settings.from_environ({name: "yes"}))


def test_settings_from_the_environment() -> None:
    assert Settings.from_environ({}) == Settings("auto", "auto", "")
    assert Settings.from_environ({"WISE_NATIVE": "", "WISE_CUDA": " AUTO "}) == Settings()
    environ = {"WISE_NATIVE": "1", "WISE_CUDA": "0", "WISE_CUDA_ARCHS": " 90a "}
    assert Settings.from_environ(environ) == Settings("1", "0", "90a")


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("80", ["arch=compute_80,code=sm_80"]),
        ("8.0 90a", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]),
        ("100,80;", ["arch=compute_100,code=sm_100", "arch=compute_80,code=sm_80"]),
        ("80+PTX", ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"]),
        ("90a+ptx", ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]),
        ("80;80", ["arch=compute_80,code=sm_80"]),
    ],
)
def test_gencode(archs: str, flags: list[str]) -> None:
    assert list(gencode_flags(archs)) == flags


@pytest.mark.parametrize("archs", ["sm_80", "80;hopper", "8", "80+SASS", "90b"])
def test_gencode_refuses_what_is_no_architecture(archs: str) -> None:
    with pytest.raises(PlanError, match=r"is not an architecture; write for example '80;90a\+PTX'"):
        gencode_flags(archs)


def test_cuda_archs_reach_the_plan() -> None:
    machine = MACHINES["everything and nvcc"]
    assert make_plan(machine, Settings()).gencode == gencode_flags(DEFAULT_CUDA_ARCHS)
    chosen = make_plan(machine, Settings(cuda_archs="90a"))
    assert (chosen.cuda_archs, chosen.gencode) == ("90a", ("arch=compute_90a,code=sm_90a",))
    with pytest.raises(PlanError, match="'x' is not an architecture"):
        make_plan(machine, Settings(cuda_archs="x"))


def test_falling_back_keeps_the_cause() -> None:
    plan = make_plan(MACHINES["everything and nvcc"], Settings(native="1"))
    cpu = without_cuda(plan, "nvcc fatal: no")
    assert (cpu.kind, cpu.warn, cpu.native_strict) == ("CPU", True, True)
    pure = without_native(cpu, "g++: error")
    assert (pure.kind, pure.warn) == ("pure Python", True)
    assert [reason.split(": ", 1)[1] for reason in pure.reasons] == ["nvcc fatal: no", "g++: error"]
