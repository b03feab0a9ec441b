"""Output files of the commands: checked before the work begins, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def check_file(path: Path | None, option: str) -> None:
    """Refuse an output file that could not be written, while nothing is lost yet.

    Raises:
        ConfigError: it is a directory, or its folder is missing or not writable.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a directory: name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: {path.parent} is not writable: choose another folder")


def check_folder(path: Path, option: str) -> None:
    """Refuse an output folder that could neither be made nor written into.

    Raises:
        ConfigError: it is a file, lies below one, or its place is not writable.
    """
    place = path
    while not place.exists():
        if place.is_symlink():
            raise ConfigError(f"{option} {path}: {place} is a broken link: choose another folder")
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{option} {path}: {place} is a file: choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: {place} is not writable: choose another folder")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` as JSON; see ``write_whole``."""
    write_whole(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, then give it its own: never half a file.

    Raises:
        OSError: the disk is full or the folder not writable; what was there before is unharmed.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp made it private
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
