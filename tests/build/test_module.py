"""The native module as built in this tree: what it needs, what it says, what it may not contain."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module() -> Any:
    if util.find_spec("wise_ext._C") is None:
        pytest.skip("no native module was built here")
    return import_module("wise_ext._C")


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"this machine has no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_build_info(module: Any) -> None:
    info = module.build_info()
    assert re.fullmatch(r"(GNU|Clang) \d+\.\d+.*", info["compiler"])
    assert re.match(r"2\.\d+\.", info["torch"])
    assert isinstance(info["cuda"], bool)
    assert {"cuda_archs", "cuda_toolkit"} <= set(info) or not info["cuda"]


def test_cpu_features_agree_with_the_kernel(module: Any) -> None:
    if module.build_info()["architecture"] != "x86_64":
        pytest.skip("the names are those of x86-64")
    features = module.cpu_features()
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    assert features
    for name, has in features.items():
        assert has == (name in flags), name


def test_counting_devices_needs_no_driver(module: Any) -> None:
    count = module.cuda_device_count()
    if not module.build_info()["cuda"]:
        assert count == 0
    elif torch.version.cuda:
        assert count == torch.cuda.device_count()
    else:
        assert count >= 0


def test_the_module_needs_no_cuda_library_and_names_no_path(module: Any) -> None:
    dynamic = run("readelf", "-d", module.__file__)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|python|nv", name)]
    assert not re.search(r"RPATH|RUNPATH", dynamic)


def test_an_instruction_set_stays_in_its_own_objects() -> None:
    modules = sorted(ROOT.glob("build/native-*/*/_C*.so"), key=lambda path: path.stat().st_mtime)
    kernels = modules[-1].parent / "CMakeFiles/wise_cpu.dir/kernels/cpu" if modules else ROOT
    objects = sorted(kernels.glob("*_avx*.o"))
    if not objects:
        pytest.skip("no objects of an in-tree build for x86-64")
    for path in objects:
        (isa,) = re.findall(r"_(avx\w+)\.cpp\.o$", path.name)
        # W, V and u: of those that several objects define one copy is kept, and it may be this one.
        shared = re.findall(r" [WVu] (.*)", run("nm", "-C", "--defined-only", str(path)))
        common = [name for name in shared if f"wise::{isa}::" not in name]
        assert not common, f"{path.name} defines what other files may share: {common}"


def test_a_module_that_cannot_load_breaks_no_import() -> None:
    code = """
import sys
sys.modules["wise_ext._C"] = None
import wise_ext, wise_ext.ops as ops
from wise_ext import NativeError, diagnostics
assert not ops.native_loaded() and ops.backend("pack", "cpu") == "reference"
report = diagnostics.collect()
assert report["native"]["failure"] and "not loaded" in diagnostics.render(report)
try:
    ops.set_backend("native")
except NativeError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "wise_ext._C" in answer.stdout
