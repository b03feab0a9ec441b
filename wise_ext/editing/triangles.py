"""Symmetric matrices in one safetensors file: their upper triangles, and a header that vouches.

The header is the file's metadata: what the numbers are about, a SHA-256 of every triangle and one
of the header itself, so that one matrix of many can be read and checked alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wise_ext._version import __version__
from wise_ext.errors import StorageError
from wise_ext.storage.encoding import canonical, parse
from wise_ext.storage.files import explained, sha256, sync_folder, write_durably

FORMAT_VERSION = 1
_HEADER = "wise-ext"
_DAMAGED = "was altered or cut short since it was written: restore it from a copy, or collect again"


def folded(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric [d, d], row by row: [d (d + 1) / 2], on the CPU."""
    rows = matrix.detach().cpu()
    return torch.cat([row[i:] for i, row in enumerate(rows)])


def unfolded(triangle: Tensor) -> Tensor:
    """The symmetric [d, d] whose upper triangle is given."""
    width = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix = triangle.new_empty(width, width)
    for i, row in enumerate(triangle.split([*range(width, 0, -1)])):
        matrix[i, i:] = row
        matrix[i:, i] = row
    return matrix


def write_triangles(
    path: Path, kind: str, triangles: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write under a temporary name, then give the file its own: never half a file.

    Args:
        path: what is there already is replaced.
        kind: what the file holds; ``read_triangles`` asks for it.
        triangles: by name, as ``folded`` gives them.
        about: JSON-able.

    Raises:
        StorageError: the disk refuses; what was there before is unharmed.
    """
    content = {
        "format": kind,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "about": dict(about),
        "sha256": {name: _digest(triangle) for name, triangle in triangles.items()},
    }
    header = content | {"checksum": sha256(canonical(content))}
    data = safetensors.torch.save(dict(triangles), {_HEADER: canonical(header).decode()})
    scratch = path.with_name(f".{path.name}.saving")
    with explained("save", path):
        try:
            write_durably(scratch, data)
            os.replace(scratch, path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise
        sync_folder(path.parent)


def read_triangles(
    path: Path, kind: str, names: Sequence[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read triangles, of all or of some names, and what they are about.

    Raises:
        StorageError: there is no such file, it holds something else, is of another format version,
            lacks a name or is damaged; the message says which, and the cure.
    """
    try:
        with explained("read", path), safe_open(path, "pt") as file:
            header = _checked(path, kind, (file.metadata() or {}).get(_HEADER))
            missing = sorted(set(names or ()) - set(header["sha256"]))
            if missing:
                raise StorageError(
                    f"{path} has nothing of {', '.join(missing)}, only of "
                    f"{', '.join(header['sha256'])}: collect with the layers that are wanted"
                )
            wanted = header["sha256"] if names is None else names
            triangles = {name: file.get_tensor(name) for name in wanted}
    except SafetensorError:
        raise StorageError(f"{path} is not a whole safetensors file: it {_DAMAGED}") from None
    for name, triangle in triangles.items():
        if _digest(triangle) != header["sha256"][name]:
            raise StorageError(f"{name} in {path} {_DAMAGED}")
    return triangles, header["about"]


def _checked(path: Path, kind: str, header: str | None) -> dict[str, Any]:
    """The header, once it is known to be what was written and of this kind and version."""
    if header is None:
        raise StorageError(f"{path} was not written by wise-ext: name a file of {kind}")
    try:
        content = parse(header.encode())
        checksum = content.pop("checksum")
        version, found = content["format_version"], content["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"the header of {path} {_DAMAGED}") from None
    if found != kind:
        raise StorageError(f"{path} holds {found}: name a file of {kind}")
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{path} has format version {version}, this wise-ext ({__version__}) reads version "
            f"{FORMAT_VERSION}: use the wise-ext that wrote it ({content.get('library_version')})"
        )
    if checksum != sha256(canonical(content)):
        raise StorageError(f"the header of {path} {_DAMAGED}")
    assert isinstance(content, dict)
    return content


def _digest(triangle: Tensor) -> str:
    return sha256(memoryview(triangle.numpy()).cast("B"))  # type: ignore[arg-type]
