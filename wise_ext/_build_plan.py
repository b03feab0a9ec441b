"""What to build on this machine: facts in, plan out; docs/build.md has the decision table.

A pure function over files that are present, never over a live GPU. Standard library only, no
imports from the package: ``setup.py`` loads this file by its path, before anything is installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TORCH_OLDEST = (2, 11)
TORCH_TOO_NEW = (3, 0)
DEFAULT_CUDA_ARCHS = "80;90a+PTX"
INSTALL_TORCH = (
    "pip install 'torch>=2.11,<3' first, in the environment you install into, then install "
    "wise-ext again"
)


class PlanError(Exception):
    """A build that was asked for by name cannot be had, or a setting makes no sense."""


@dataclass(frozen=True)
class Facts:
    """What was found on the machine. A tool is its path, or None where it is absent."""

    platform: str
    """``sys.platform``, such as ``linux``."""
    compiler: str | None
    """The C++ compiler."""
    python_headers: str | None
    """The directory of ``Python.h``."""
    cmake: str | None
    ninja: str | None
    pybind11: str | None
    """pybind11's header directory."""
    torch: str | None
    """Version of the torch that was found, such as ``2.13.0+cpu``."""
    torch_problem: str | None = None
    """Why torch could not be used, where ``torch`` is None."""
    nvcc: str | None = None


@dataclass(frozen=True)
class Settings:
    """The three environment variables, as text: ``auto``, ``0`` or ``1``."""

    native: str = "auto"
    cuda: str = "auto"
    cuda_archs: str = ""

    @classmethod
    def from_environ(cls, environ: dict[str, str]) -> Settings:
        """Read WISE_NATIVE, WISE_CUDA and WISE_CUDA_ARCHS; absent or empty means the default."""
        return cls(
            native=environ.get("WISE_NATIVE", "").strip().lower() or "auto",
            cuda=environ.get("WISE_CUDA", "").strip().lower() or "auto",
            cuda_archs=environ.get("WISE_CUDA_ARCHS", "").strip(),
        )


@dataclass(frozen=True)
class Plan:
    """What will be built, and why not more."""

    cpu: bool
    cuda: bool = False
    native_strict: bool = False
    """A failing build is an error, not a fall back to pure Python."""
    cuda_strict: bool = False
    """A failing CUDA build is an error, not a fall back to the CPU kernels."""
    cuda_archs: str = ""
    gencode: tuple[str, ...] = ()
    """One value of nvcc's ``-gencode`` each."""
    reasons: tuple[str, ...] = field(default=())
    """Why the plan holds less than it could, one sentence each."""
    warn: bool = False
    """The reasons are a shortcoming of the machine, not the user's wish."""

    @property
    def kind(self) -> str:
        """``pure Python``, ``CPU`` or ``CPU and CUDA``."""
        return "CPU and CUDA" if self.cuda else "CPU" if self.cpu else "pure Python"


def make_plan(facts: Facts, settings: Settings) -> Plan:
    """Decide what to build.

    Raises:
        PlanError: a setting is malformed or contradicts another, or something asked for with
            ``1`` cannot be built here; the message names everything missing and its cure.
    """
    for name, value in (("WISE_NATIVE", settings.native), ("WISE_CUDA", settings.cuda)):
        if value not in ("auto", "0", "1"):
            raise PlanError(f"{name}={value!r} is not a choice: use auto, 0 or 1")
    native_strict = settings.native == "1" or settings.cuda == "1"
    if settings.native == "0":
        if settings.cuda == "1":
            raise PlanError("WISE_CUDA=1 contradicts WISE_NATIVE=0: unset one of them")
        return Plan(cpu=False, reasons=("WISE_NATIVE=0 asks for pure Python",))

    missing = _missing_for_cpu(facts)
    if missing:
        if native_strict:
            asked = "WISE_NATIVE=1" if settings.native == "1" else "WISE_CUDA=1"
            raise PlanError(f"{asked}, but the native module cannot be built: {'; '.join(missing)}")
        return Plan(cpu=False, reasons=tuple(missing), warn=True)

    native_only = settings.native == "1"
    if settings.cuda == "0":
        return Plan(
            cpu=True, native_strict=native_only, reasons=("WISE_CUDA=0 asks for no CUDA kernels",)
        )
    if facts.nvcc is None:
        why = (
            "there is no nvcc (install the CUDA toolkit 12 or newer, or set CUDA_HOME to where it "
            "is)"
        )
        if settings.cuda == "1":
            raise PlanError(f"WISE_CUDA=1, but {why}")
        return Plan(cpu=True, native_strict=native_only, reasons=(f"no CUDA kernels: {why}",))
    archs = settings.cuda_archs or DEFAULT_CUDA_ARCHS
    return Plan(
        cpu=True,
        cuda=True,
        native_strict=native_strict,
        cuda_strict=settings.cuda == "1",
        cuda_archs=archs,
        gencode=gencode_flags(archs),
    )


def without_cuda(plan: Plan, cause: str) -> Plan:
    """Return the plan to fall back to when an optional CUDA build failed."""
    return Plan(
        cpu=True,
        native_strict=plan.native_strict,
        reasons=(f"the CUDA kernels failed to build: {cause}",),
        warn=True,
    )


def without_native(plan: Plan, cause: str) -> Plan:
    """Return the plan to fall back to when an optional native build failed."""
    reasons = (*plan.reasons, f"the native module failed to build: {cause}")
    return Plan(cpu=False, reasons=reasons, warn=True)


def parse_version(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as ``2.13.0+cpu``."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise PlanError(f"{text!r} is not a version of torch")
    return int(match[1]), int(match[2])


def gencode_flags(archs: str) -> tuple[str, ...]:
    """Turn ``80;90a+PTX`` into values of nvcc's ``-gencode``.

    Items are separated by semicolons, commas or blanks; ``8.0`` and ``80`` are the same. ``+PTX``
    adds code that later cards compile for themselves. Architecture-specific code (``90a``) has no
    such form, so its ``+PTX`` is that of the plain architecture.

    Raises:
        PlanError: an item is not an architecture.
    """
    flags: dict[str, None] = {}
    for item in re.split(r"[;,\s]+", archs.strip(";, \t")):
        match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
        if match is None:
            raise PlanError(
                f"WISE_CUDA_ARCHS: {item!r} is not an architecture; write for example "
                f"'{DEFAULT_CUDA_ARCHS}'"
            )
        number, suffix = match[1] + match[2], match[3].lower()
        flags[f"arch=compute_{number}{suffix},code=sm_{number}{suffix}"] = None
        if match[4]:
            flags[f"arch=compute_{number},code=compute_{number}"] = None
    return tuple(flags)


def _missing_for_cpu(facts: Facts) -> list[str]:
    """Everything that stands between this machine and a native module, each with its cure."""
    if facts.platform != "linux":
        return [f"the native module is built on Linux only, and this is {facts.platform}"]
    missing = []
    if facts.compiler is None:
        missing.append(
            "no C++ compiler was found (install g++ 11 or newer, or set CXX to the compiler)"
        )
    if facts.python_headers is None:
        missing.append("Python.h is absent (install your system's python3-dev package)")
    for tool in ("cmake", "ninja", "pybind11"):
        if getattr(facts, tool) is None:
            missing.append(f"{tool} is absent (pip install {tool})")
    if facts.torch is None:
        missing.append(f"{facts.torch_problem or 'torch is not installed'} ({INSTALL_TORCH})")
    elif not TORCH_OLDEST <= parse_version(facts.torch) < TORCH_TOO_NEW:
        missing.append(f"torch {facts.torch} is not supported ({INSTALL_TORCH})")
    return missing
