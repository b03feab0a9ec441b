"""setup.py: what it finds on the machine, and how it falls back, fails or cleans up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
EMPTY_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) { m.attr("compiler") = WISE_COMPILER; }
"""

pytest.importorskip("setuptools", reason="setup.py needs setuptools")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wise_ext_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executable(path: Path, text: str = "#!/bin/sh\nexit 0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class TestFacts:
    def test_compiler_is_cxx_where_set(
        self, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = executable(tmp_path / "my-c++")
        monkeypatch.setenv("CXX", f"{mine} -m64")
        assert setup_py.find_compiler() == str(mine)
        monkeypatch.setenv("CXX", str(tmp_path / "absent"))
        assert setup_py.find_compiler() is None

    def test_compiler_on_the_path(
        self, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert setup_py.find_compiler() is None
        clang = executable(tmp_path / "clang++")
        assert setup_py.find_compiler() == str(clang)
        gcc = executable(tmp_path / "g++")
        assert setup_py.find_compiler() == str(gcc)

    def test_nvcc_is_taken_from_the_most_explicit_place(
        self, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_path = executable(tmp_path / "path" / "nvcc")
        in_home = executable(tmp_path / "home" / "bin" / "nvcc")
        named = executable(tmp_path / "named" / "nvcc-13")
        for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(on_path.parent))
        assert setup_py.find_nvcc() == str(on_path)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert setup_py.find_nvcc() == str(in_home)
        monkeypatch.setenv("CUDACXX", str(named))
        assert setup_py.find_nvcc() == str(named)
        monkeypatch.setenv("CUDACXX", str(tmp_path / "absent"))
        assert setup_py.find_nvcc() is None

    def test_the_running_torch_is_found_behind_build_isolation(
        self, setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What pip does to its backend: a sitecustomize on PYTHONPATH that hides site-packages.
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.path[:] = sys.path[:1]\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        hidden = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
        assert hidden.returncode != 0
        import torch

        found = setup_py.find_torch()
        assert found["version"] == torch.__version__
        assert all(Path(folder, "torch").is_dir() for folder in found["include"])
        assert Path(found["lib"], "libtorch_cpu.so").is_file()

    @pytest.mark.parametrize(
        ("complaint", "problem"),
        [
            ("ModuleNotFoundError: No module named 'torch'", "torch is not installed for"),
            ("ImportError: libfoo.so: cannot open", "torch cannot be imported by .*libfoo"),
            ("", "it said nothing"),
        ],
    )
    def test_no_torch_is_explained(
        self, setup_py: ModuleType, tmp_path: Path, complaint: str, problem: str
    ) -> None:
        fake = executable(tmp_path / "python", f'#!/bin/sh\necho "{complaint}" >&2\nexit 1\n')
        found = setup_py.find_torch(str(fake))
        assert list(found) == ["problem"]
        assert re.search(problem, found["problem"])

    def test_no_python_is_explained(self, setup_py: ModuleType, tmp_path: Path) -> None:
        assert "does not start" in setup_py.find_torch(str(tmp_path / "absent"))["problem"]

    def test_gathered_facts_are_this_machine(self, setup_py: ModuleType) -> None:
        facts = setup_py.gather_facts({"version": "2.13.0+cpu"})
        assert (facts.platform, facts.torch, facts.torch_problem) == (
            sys.platform,
            "2.13.0+cpu",
            None,
        )
        for name in ("compiler", "cmake", "ninja", "nvcc"):
            path = getattr(facts, name)
            assert path is None or os.access(path, os.X_OK)
        if facts.python_headers is not None:
            assert Path(facts.python_headers, "Python.h").is_file()

    def test_facts_without_torch(self, setup_py: ModuleType) -> None:
        facts = setup_py.gather_facts({"problem": "torch is not installed for me"})
        assert (facts.torch, facts.torch_problem) == (None, "torch is not installed for me")


@pytest.mark.parametrize(
    ("log", "first"),
    [
        ("[1/3] cc\nm.cpp:3:1: error: no\nm.cpp:9:1: error: later", "m.cpp:3:1: error: no"),
        ("x.h:1:9: fatal error: y.h: No such file", "x.h:1:9: fatal error: y.h: No such file"),
        ("nvcc fatal   : Unsupported gpu", "nvcc fatal   : Unsupported gpu"),
        (
            "-- ok\nCMake Error at CMakeLists.txt:3 (project):\n  No CXX\n  compiler.\n\nmore",
            "CMake Error at CMakeLists.txt:3 (project): No CXX compiler.",
        ),
        ("all well\nstopped\n\n", "stopped"),
        ("", "it said nothing"),
    ],
)
def test_first_error(setup_py: ModuleType, log: str, first: str) -> None:
    assert setup_py.first_error(log) == first


def test_a_stale_cmake_cache_is_noticed(setup_py: ModuleType, tmp_path: Path) -> None:
    cache = tmp_path / "CMakeCache.txt"
    assert not setup_py.cache_is_stale(tmp_path)
    good = f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\nCMAKE_CXX_COMPILER:FILEPATH={sys.executable}\n"
    cache.write_text(good)
    assert not setup_py.cache_is_stale(tmp_path)
    cache.write_text(good.replace(str(ROOT), "/elsewhere"))
    assert setup_py.cache_is_stale(tmp_path)
    cache.write_text(good.replace(sys.executable, "/gone/c++"))
    assert setup_py.cache_is_stale(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, without the kernels: it compiles in seconds."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("readme\n")
    (tmp_path / "LICENSE").write_text("licence\n")
    package = tmp_path / "wise_ext"
    package.mkdir()
    for name in ("_build_plan.py", "_build_info.py", "_version.py"):
        shutil.copy(ROOT / "wise_ext" / name, package)
    (package / "__init__.py").write_text("")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "module.cpp").write_text(EMPTY_MODULE)
    (tmp_path / "kernels" / "cuda").mkdir(parents=True)
    return tmp_path


def build(tree: Path, **environ: str) -> tuple[int, str, dict[str, object] | None]:
    """Build in place; return the exit status, the output, and what was written down."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WISE_")}
    answer = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**inherited, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    info = tree / "wise_ext" / "_build_info.json"
    return answer.returncode, answer.stdout, json.loads(info.read_text()) if info.exists() else None


def module_of(tree: Path) -> Path:
    return tree / "wise_ext" / f"_C{SUFFIX}"


def needs_tools(setup_py: ModuleType, *also: str) -> None:
    facts = setup_py.gather_facts(setup_py.find_torch())
    for name in ("compiler", "cmake", "ninja", "pybind11", "python_headers", "torch", *also):
        if getattr(facts, name) is None:
            pytest.skip(f"this machine has no {name}")


class TestBuild:
    def test_no_compiler_leaves_pure_python_and_says_so(self, tree: Path) -> None:
        module_of(tree).write_bytes(b"left over from an earlier build")
        status, output, info = build(tree, CXX="/absent/c++")
        assert status == 0
        assert "building pure Python only: no C++ compiler was found (install g++" in output
        assert info is not None
        assert (info["kind"], info["warn"]) == ("pure Python", True)
        assert not module_of(tree).exists()

    def test_no_compiler_with_native_1_fails(self, tree: Path) -> None:
        status, output, info = build(tree, CXX="/absent/c++", WISE_NATIVE="1")
        assert status != 0
        assert "WISE_NATIVE=1, but the native module cannot be built: no C++ compiler" in output
        assert "Traceback" not in output
        assert info is None

    def test_native_0_builds_nothing_and_does_not_warn(self, tree: Path) -> None:
        status, output, info = build(tree, WISE_NATIVE="0")
        assert status == 0
        assert "warning: CMakeBuild" not in output
        assert info == {
            "kind": "pure Python",
            "reasons": ["WISE_NATIVE=0 asks for pure Python"],
            "warn": False,
        }

    def test_a_bad_setting_fails(self, tree: Path) -> None:
        status, output, _ = build(tree, WISE_CUDA="maybe")
        assert status != 0
        assert "WISE_CUDA='maybe' is not a choice: use auto, 0 or 1" in output

    def test_code_that_does_not_compile(self, setup_py: ModuleType, tree: Path) -> None:
        needs_tools(setup_py)
        (tree / "csrc" / "module.cpp").write_text("#error this cannot be\n")
        status, output, info = build(tree, WISE_CUDA="0")
        assert status == 0
        assert "building pure Python only" in output
        assert info is not None
        assert info["kind"] == "pure Python"
        assert "this cannot be" in str(info["reasons"])
        status, output, _ = build(tree, WISE_CUDA="0", WISE_NATIVE="1")
        assert status != 0
        assert "error: #error this cannot be" in output.splitlines()[-1]

    @pytest.mark.slow
    def test_cpu_build(self, setup_py: ModuleType, tree: Path) -> None:
        needs_tools(setup_py)
        status, output, info = build(tree, WISE_CUDA="0")
        assert status == 0, output
        assert info is not None
        assert info["kind"] == "CPU"
        code = "import torch, wise_ext._C as c; print(c.compiler)"
        answer = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True)
        assert answer.returncode == 0, answer.stderr
        before = module_of(tree).stat().st_mtime_ns
        status, output, _ = build(tree, WISE_CUDA="0")
        assert status == 0
        assert "no work to do" in output
        assert module_of(tree).stat().st_mtime_ns == before

    @pytest.mark.slow
    def test_cuda_that_does_not_compile(self, setup_py: ModuleType, tree: Path) -> None:
        needs_tools(setup_py, "nvcc")
        (tree / "kernels" / "cuda" / "bad.cu").write_text("#error no such card\n")
        status, output, info = build(tree, WISE_CUDA_ARCHS="90a")
        assert status == 0, output
        assert info is not None
        assert info["kind"] == "CPU"
        assert "no such card" in str(info["reasons"])
        assert "building CPU only: the CUDA kernels failed to build" in output
        assert module_of(tree).exists()
        status, output, _ = build(tree, WISE_CUDA_ARCHS="90a", WISE_CUDA="1")
        assert status != 0
        assert "no such card" in output.splitlines()[-1]
