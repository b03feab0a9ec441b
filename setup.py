"""Drives CMake to build wise_ext._C, as far as this machine can; docs/build.md explains.

Everything declarative is in pyproject.toml. What to build is decided by wise_ext/_build_plan.py;
this file gathers its facts, carries the plan out, and writes down what came of it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_build_info.json"
SETUPTOOLS_OLDEST = 77

# Run in the interpreter that is installed into. Under build isolation pip hides that one's
# packages from this process by PYTHONPATH alone; a child without it sees them.
PROBE_TORCH = """
import json, pathlib, torch
root = pathlib.Path(torch.__file__).parent
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
    "include": [str(root / "include"), str(root / "include/torch/csrc/api/include")],
    "lib": str(root / "lib")}))
"""


def load_build_plan() -> ModuleType:
    """Load wise_ext/_build_plan.py by its path: the package itself may not be importable yet."""
    spec = importlib.util.spec_from_file_location(
        "_build_plan", ROOT / "wise_ext" / "_build_plan.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build_plan = load_build_plan()


def find_torch(python: str = sys.executable) -> dict[str, Any]:
    """Ask the environment that is installed into for its torch.

    Returns ``version``, ``cuda``, ``include`` and ``lib``; or ``problem``, a clause saying why not.
    """
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    environ = {key: value for key, value in os.environ.items() if key not in hidden}
    probe = [python, "-c", PROBE_TORCH]
    try:
        answer = subprocess.run(
            probe, env=environ, cwd=os.sep, capture_output=True, text=True, check=False
        )
    except OSError as error:
        return {"problem": f"{python} does not start: {error}"}
    if answer.returncode == 0:
        found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        return found
    lines = answer.stderr.strip().splitlines() or ["it said nothing"]
    if "No module named 'torch'" in lines[-1]:
        return {"problem": f"torch is not installed for {python}"}
    return {"problem": f"torch cannot be imported by {python}: {lines[-1]}"}


def find_compiler() -> str | None:
    """Return the C++ compiler: CXX if set, else the first of the usual names."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(chosen.split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """Return nvcc: CUDACXX, then CUDA_HOME or CUDA_PATH, then PATH, then the usual folder."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return shutil.which("nvcc", path=str(Path(os.environ[name]) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_pybind11() -> str | None:
    """Return pybind11's header directory."""
    try:
        import pybind11
    except ImportError:
        return None
    return str(pybind11.get_include())


def find_tool(name: str) -> str | None:
    """Return cmake or ninja: beside this Python, which may not be on PATH, or on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def gather_facts(torch: dict[str, Any]) -> Any:
    """Look at the machine; ``torch`` is what find_torch returned."""
    headers = sysconfig.get_paths()["include"]
    return build_plan.Facts(
        platform=sys.platform,
        compiler=find_compiler(),
        python_headers=headers if (Path(headers) / "Python.h").is_file() else None,
        cmake=find_tool("cmake"),
        ninja=find_tool("ninja"),
        pybind11=find_pybind11(),
        torch=torch.get("version"),
        torch_problem=torch.get("problem"),
        nvcc=find_nvcc(),
    )


def cmake_arguments(facts: Any, plan: Any, torch: dict[str, Any]) -> list[str]:
    """The definitions CMakeLists.txt asks for."""
    definitions = {
        "CMAKE_MAKE_PROGRAM": facts.ninja,
        "CMAKE_BUILD_TYPE": "Release",
        "WISE_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "WISE_PYTHON_INCLUDE_DIR": facts.python_headers,
        "WISE_PYBIND11_INCLUDE_DIR": facts.pybind11,
        "WISE_TORCH_INCLUDE_DIRS": ";".join(torch["include"]),
        "WISE_TORCH_LIB_DIR": torch["lib"],
        "WISE_TORCH_VERSION": torch["version"],
        "WISE_WITH_CUDA": "ON" if plan.cuda else "OFF",
        "WISE_CUDA_ARCHS": plan.cuda_archs.replace(";", " "),
        "WISE_CUDA_GENCODE": ";".join(plan.gencode),
        "WISE_TESTING": "ON" if os.environ.get("WISE_TESTING") == "1" else "OFF",
        "WISE_SANITIZE": os.environ.get("WISE_SANITIZE", ""),
    }
    if "CXX" not in os.environ:
        definitions["CMAKE_CXX_COMPILER"] = facts.compiler
    if plan.cuda:
        definitions["CMAKE_CUDA_COMPILER"] = facts.nvcc
    return [f"-D{name}={value}" for name, value in definitions.items()]


class BuildFailed(Exception):
    """CMake or a compiler refused; the message is what it said first."""


def first_error(output: str) -> str:
    """Return the first complaint in a build log, on one line; its last line where none is found."""
    lines = [line.strip() for line in output.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):
            # CMake says where on the first line and what in the paragraph below it.
            paragraph = list(itertools.takewhile(bool, lines[number + 1 :]))
            return " ".join([line, *paragraph])
        if re.search(r"\b(error|fatal)\b *:", line):
            return line
    return next(filter(None, reversed(lines)), "it said nothing")


def run_logged(command: list[str]) -> None:
    """Run a build step and echo its output; raise BuildFailed with its first error."""
    answer = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    sys.stderr.write(answer.stdout)
    if answer.returncode:
        raise BuildFailed(first_error(answer.stdout))


class CMakeBuild(build_ext):
    """build_ext that carries out the plan, and falls back where the plan may."""

    def run(self) -> None:
        """Plan, build, and write down what was built and why not more."""
        torch = find_torch()
        facts = gather_facts(torch)
        settings = build_plan.Settings.from_environ(dict(os.environ))
        try:
            plan = build_plan.make_plan(facts, settings)
            plan = self.carry_out(facts, plan, torch)
        except (build_plan.PlanError, BuildFailed) as error:
            raise SystemExit(f"wise-ext: {error}") from error
        if plan.warn:
            for reason in plan.reasons:
                self.warn(f"wise-ext: building {plan.kind} only: {reason}")
        self.write_build_info(plan)

    def carry_out(self, facts: Any, plan: Any, torch: dict[str, Any]) -> Any:
        """Build what the plan says; return the plan that held in the end."""
        product = self.product()
        if plan.cpu:
            try:
                self.put(self.compile(facts, plan, torch), product)
                return plan
            except BuildFailed as error:
                if plan.cuda and not plan.cuda_strict:
                    return self.carry_out(facts, build_plan.without_cuda(plan, str(error)), torch)
                if plan.native_strict:
                    raise
                plan = build_plan.without_native(plan, str(error))
        # An earlier build's module must not outlive the decision to have none.
        product.unlink(missing_ok=True)
        return plan

    def compile(self, facts: Any, plan: Any, torch: dict[str, Any]) -> Path:
        """Run CMake and Ninja; return the module they made."""
        # Not build_temp, which pip's editable installs throw away: a rebuild is incremental. By
        # kind, so that choosing another kind and coming back costs nothing.
        kind = "cuda" if plan.cuda else "cpu"
        purpose = os.environ.get("WISE_SANITIZE") or "native"
        folder = ROOT / "build" / f"{purpose}-{sys.implementation.cache_tag}" / kind
        folder.mkdir(parents=True, exist_ok=True)
        configure = [facts.cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        if cache_is_stale(folder):
            configure.append("--fresh")
        run_logged([*configure, *cmake_arguments(facts, plan, torch)])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run_logged([facts.cmake, "--build", str(folder), "--parallel", jobs])
        return folder / self.product().name

    def package_folder(self) -> Path:
        """Where the package's built files go: the source tree for editable installs."""
        return ROOT / "wise_ext" if self.inplace else ROOT / self.build_lib / "wise_ext"

    def product(self) -> Path:
        """Where the module goes."""
        return self.package_folder() / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    def put(self, source: Path, target: Path) -> None:
        """Copy by rename: a running process may have the old module mapped."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy2(source, temporary)
        temporary.replace(target)

    def write_build_info(self, plan: Any) -> None:
        """Leave what was decided where wise_ext.diagnostics reads it."""
        target = self.package_folder() / BUILD_INFO
        target.parent.mkdir(parents=True, exist_ok=True)
        record = {"kind": plan.kind, "reasons": list(plan.reasons), "warn": plan.warn}
        target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        """Name what lands in the wheel."""
        outputs = [self.package_folder() / BUILD_INFO, self.product()]
        return [str(path) for path in outputs if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Editable installs use the source tree itself: nothing is mapped."""
        return {}


def cache_is_stale(folder: Path) -> bool:
    """Whether a build folder belongs to another source tree or to a compiler that is gone."""
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        return False
    for line in cache.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        if name.startswith("CMAKE_HOME_DIRECTORY:") and Path(value) != ROOT:
            return True
        if name.startswith(("CMAKE_CXX_COMPILER:", "CMAKE_CUDA_COMPILER:")) and (
            not Path(value).exists()
        ):
            return True
    return False


if __name__ == "__main__":
    # Only --no-build-isolation meets an old one, and what it says of pyproject.toml misleads.
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_OLDEST:
        raise SystemExit(
            f"wise-ext: setuptools {setuptools.__version__} is too old to build it: "
            f"pip install -U 'setuptools>={SETUPTOOLS_OLDEST}'"
        )
    setup(
        # The Triton kernels live with the other kernels. A package directly in kernels/ would
        # shadow Hugging Face's package of that name.
        packages=[*find_packages(include=["wise_ext", "wise_ext.*"]), "wise_ext.triton_kernels"],
        package_dir={"wise_ext.triton_kernels": "kernels/triton"},
        ext_modules=[Extension("wise_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
