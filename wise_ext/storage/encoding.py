"""What the files hold: canonical JSON, the configuration's envelope, the ledger, the tensors.

Equal content gives equal bytes: keys are sorted, floats are written as Python's shortest form that
reads back the same, tensors in safetensors' own order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from wise_ext._version import __version__
from wise_ext.errors import StorageError
from wise_ext.storage.commit import CONFIG, LEDGER, TENSORS
from wise_ext.storage.files import Content, sha256

FORMAT = "wise-ext-memory"
FORMAT_VERSION = 6
LEDGER_FIELDS = (
    "id",
    "prompt",
    "target",
    "locality_prompt",
    "shard",
    "step",
    "iterations",
    "losses",
    "indicator",
    "guests",
    "record",
)
# Of safetensors' names, those of the tensors that a memory has.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U16": torch.uint16,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
DAMAGED = "was altered or cut short since it was written: restore it from a copy, or edit again"


def canonical(value: object, indent: int | None = None) -> bytes:
    """Return a value as JSON in UTF-8 with sorted keys, one line unless ``indent`` is given.

    Raises:
        StorageError: the value has no JSON form (NaN and infinity have none).
    """
    separators = (",", ": ") if indent else (",", ":")
    try:
        text = json.dumps(
            value,
            sort_keys=True,
            ensure_ascii=False,
            allow_nan=False,
            indent=indent,
            separators=separators,
        )
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise StorageError(f"cannot be stored as JSON: {error}; give finite plain values") from None


def parse(data: bytes) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, or is nested too deeply to be ours.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def digest_edits(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of a list of edits, in order, for the journal to recognise them by."""
    return sha256(b"".join(canonical(dict(record)) for record in records))


def ledger_entry(
    record: Mapping[str, Any],
    *,
    locality_prompt: str | None,
    shard: int | None,
    step: int,
    iterations: int,
    losses: Mapping[str, float],
    indicator: float | None,
    guests: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the ledger's line about one edit: what it was, and what is needed to make it again.

    Args:
        record: the edit as it was given: ``id``, ``prompt``, ``target_new`` and what else it had.
        locality_prompt: the text that training left alone, where the editor chose it.
        shard: where the edit went; None for one that a later edit replaced.
        step: the training step (counted from 0 over the memory's life) that wrote it; edits
            trained together share one.
        iterations: optimiser steps spent.
        losses: the last value of each part of the loss.
        indicator: ``r(edit)`` (Eq. 3) after training, where it was measured.
        guests: edits of full shards that were trained again because of this one.
    """
    return {
        "id": record["id"],
        "prompt": record["prompt"],
        "target": record["target_new"],
        "locality_prompt": locality_prompt,
        "shard": shard,
        "step": step,
        "iterations": iterations,
        "losses": dict(losses),
        "indicator": indicator,
        "guests": list(guests),
        "record": dict(record),
    }


def encode_config(
    settings: Mapping[str, Any],
    memory: Mapping[str, Any],
    base: Mapping[str, Any],
    tensors: bytes,
    ledger: bytes,
) -> bytes:
    """Return ``wise_config.json``: it vouches for the other two files, and for itself."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base": dict(base),
        "settings": dict(settings),
        "memory": dict(memory),
        "files": {
            name: {"bytes": len(data), "sha256": sha256(data)}
            for name, data in ((TENSORS, tensors), (LEDGER, ledger))
        },
    }
    # As it will read back: a number used as a key becomes text, and sorts as text.
    normal: dict[str, Any] = parse(canonical(content))
    return canonical(normal | {"checksum": sha256(canonical(normal))}, indent=2)


def decode_config(data: bytes, where: str) -> dict[str, Any]:
    """Read ``wise_config.json`` and check its format, version and checksum.

    Args:
        data: the file.
        where: the directory, for the message.

    Raises:
        StorageError: naming file, cause and cure.
    """
    try:
        content = parse(data)
    except ValueError:
        raise StorageError(f"{CONFIG} in {where} {DAMAGED}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StorageError(f"{CONFIG} in {where} does not describe a wise-ext memory: {DAMAGED}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{where} has format version {version}, this wise-ext ({__version__}) reads version "
            f"{FORMAT_VERSION}: use the wise-ext that wrote it ({content.get('library_version')})"
        )
    checksum = content.pop("checksum", None)
    # Comparing the bytes too catches changes that JSON does not see, such as white space.
    whole = canonical(content | {"checksum": checksum}, indent=2)
    if checksum != sha256(canonical(content)) or whole != data:
        raise StorageError(f"{CONFIG} in {where} {DAMAGED}")
    content["checksum"] = checksum
    return content


def check_digest(name: str, data: Content, expected: Mapping[str, Any], where: str) -> None:
    """Check a file against its length and hash in the configuration.

    Raises:
        StorageError: naming the file and what differs.
    """
    if len(data) != expected["bytes"]:
        detail = f"has {len(data)} bytes instead of {expected['bytes']}"
        raise StorageError(f"{name} in {where} {detail}: it {DAMAGED}")
    if sha256(data) != expected["sha256"]:
        raise StorageError(f"{name} in {where} {DAMAGED}")


def encode_ledger(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Return ``edits.jsonl``: one line an edit."""
    return b"".join(canonical(dict(entry)) for entry in entries)


def decode_ledger(data: bytes, where: str) -> list[dict[str, Any]]:
    """Read ``edits.jsonl``.

    Raises:
        StorageError: naming the line that is not a JSON object.
    """
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            entry = parse(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise StorageError(f"{LEDGER} in {where}, line {number}: {DAMAGED}")
        entries.append(entry)
    return entries


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain)


def decode_tensors(data: Content, where: str) -> dict[str, Tensor]:
    """Read a safetensors file; the tensors of a mapped one lie where it is mapped.

    Raises:
        StorageError: it is not one, or not a whole one.
    """
    try:
        if isinstance(data, bytes):
            return safetensors.torch.load(data)
        return _mapped_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{where} is not a whole safetensors file ({error}): it {DAMAGED}"
        ) from None


def _mapped_tensors(data: Content) -> dict[str, Tensor]:
    """What the library reads by copying: eight bytes of length, a JSON header, then the data."""
    size = int.from_bytes(data[:8], "little")
    begin, found = 8 + size, {}
    if not 2 <= size <= len(data) - 8:
        raise ValueError("the header is longer than the file")
    for name, told in parse(data[8:begin]).items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES[told["dtype"]], told["shape"]
        first, last = told["data_offsets"]
        count = math.prod(shape)
        if not 0 <= first <= last <= len(data) - begin or last - first != count * dtype.itemsize:
            raise ValueError(f"{name} does not lie within the file")
        if count:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin + first)
            found[name] = flat.view(shape)
        else:
            found[name] = torch.empty(shape, dtype=dtype)
    return found
