"""``wise-ext info``: what is installed, how it was built, which backend each op takes and why."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata, resources

from .console import table


def info() -> None:
    """Show versions, the build, CPU features, and which backend each operation would use."""
    import torch

    from .. import ops
    from .._version import __version__

    cuda = torch.cuda.device_count()
    rows: list[tuple[str, object]] = [
        ("wise-ext", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        *((name, _installed(name)) for name in ("torch", "transformers", "safetensors")),
        ("cpus", f"{os.cpu_count()} ({torch.get_num_threads()} torch threads)"),
        ("gpus", cuda or "none that torch can use"),
        ("built as", _built_as()),
    ]
    if ops.native_loaded():
        from .. import _C

        rows.append(("native module", "loaded"))
        rows.extend((f"  {key}", value) for key, value in _C.build_info().items())
        features = [name for name, present in _C.cpu_features().items() if present]
        rows.append(("cpu features", ", ".join(features) or "none that matter here"))
        rows.append(("cpu kernels use", ops.cpu_isa()))
    else:
        rows.append(("native module", f"cannot be used: {ops.native_failure()}"))
    rows.append(("backend choice", f"{ops.get_backend()} (WISE_BACKEND, set_backend)"))
    table("wise-ext", ("what", "value"), rows)

    devices = ["cpu", "cuda"] if cuda else ["cpu"]
    table("operations", ("op", "device", "backend", "why"), list(_backends(devices)))


def _backends(devices: list[str]) -> Iterator[tuple[str, str, str, str]]:
    from .. import ops
    from ..errors import NativeError

    for op in ops.OPS:
        for device in devices:
            try:
                backend = ops.backend(op, device)
            except NativeError as error:
                yield op, device, "none", str(error)
                continue
            if backend == "native":
                why = "a kernel for this device is loaded"
            elif ops.get_backend() == "reference":
                why = "chosen by name"
            elif not ops.native_loaded():
                why = "the native module cannot be used"
            else:
                why = "the native module has no kernel for this device"
            yield op, device, backend, why


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _built_as() -> str:
    """What the build wrote down about itself."""
    try:
        text = resources.files("wise_ext").joinpath("_build_info.json").read_text("utf-8")
        facts = json.loads(text)
    except (OSError, ValueError):
        return "no record (not installed by setup.py)"
    reasons = "; ".join(str(reason) for reason in facts.get("reasons", []))
    return str(facts.get("kind", "unknown")) + (f" ({reasons})" if reasons else "")
