"""Durable writing: the few file operations that everything on disk is made of.

Everything here goes through ``os`` one call at a time, which lets the tests stop a save or a
journal at every one of these calls.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from wise_ext.errors import StorageError

_CURES = (
    (
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "no space is left",
        "free some or choose another folder",
    ),
    (
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "writing there is not allowed",
        "choose a folder you may write to",
    ),
    (
        (errno.ENOTDIR, errno.EEXIST),
        "a file stands where a folder is needed",
        "move it away or choose another folder",
    ),
)


#: a file, read or mapped
Content: TypeAlias = bytes | mmap.mmap


def map_file(path: Path) -> Content:
    """Return a file mapped into memory: its pages are read when they are needed and shared with
    whoever else maps it. What is written there stays with this process."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def sha256(data: Content) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file, or over an old one, and wait until it is on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write all bytes to an open file; ``os.write`` may take only a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def sync_file(path: Path) -> None:
    """Wait until a file that was written is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents; return those that were not there, outermost first."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    made: list[Path] = []
    with undone_on_failure(made):
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
            sync_folder(folder.parent)
    return made


def discard_folder(path: Path) -> None:
    """Remove a folder of plain files; one that is not there is fine."""
    with suppress(FileNotFoundError):
        for entry in list(path.iterdir()):
            entry.unlink()
        path.rmdir()


@contextmanager
def undone_on_failure(made: list[Path], *scratch: Path) -> Iterator[None]:
    """When the block fails, remove scratch folders, then the new folders that are empty again."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in scratch:
                discard_folder(folder)
            for folder in reversed(made):
                folder.rmdir()
        raise


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``StorageError`` with its cause and cure."""
    try:
        yield
    except OSError as error:
        reason, cure = str(error.strerror or error), "check the disk and try again"
        for codes, cause, remedy in _CURES:
            if error.errno in codes:
                reason, cure = f"{cause} ({reason})", remedy
        raise StorageError(f"cannot {action} {path}: {reason}; {cure}") from error
