"""What the build decided, as setup.py wrote it down beside the package. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("_build_info.json")


@dataclass(frozen=True)
class BuildInfo:
    """The plan that held in the end."""

    kind: str
    """``pure Python``, ``CPU`` or ``CPU and CUDA``."""
    reasons: tuple[str, ...]
    """Why no more was built, one sentence each."""


def read_build_info(file: Path = FILE) -> BuildInfo:
    """Read the record; a package run from a source tree that was never built has none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return BuildInfo(str(record["kind"]), tuple(map(str, record["reasons"])))
    except FileNotFoundError:
        return BuildInfo("pure Python", ("this source tree was never built (pip install -e .)",))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return BuildInfo("unknown", (f"{file} cannot be read: {error}",))
