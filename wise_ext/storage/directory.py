"""Saving and loading an edited memory: ``wise_config.json``, the tensors and the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wise_ext.errors import ConfigError, StorageError
from wise_ext.memory.side_memory import SideMemory
from wise_ext.storage import encoding
from wise_ext.storage.commit import CONFIG, LEDGER, TENSORS, commit, has_journal, read_committed
from wise_ext.storage.files import Content, explained

if TYPE_CHECKING:
    from wise_ext.storage.journal import Journal

_RETRIES = 2


@dataclass(frozen=True)
class StoredMemory:
    """What a memory directory holds.

    Attributes:
        memory: the shards and how prompts find them.
        config: the settings it was made with.
        ledger: one entry an edit, in order; ``encoding.LEDGER_FIELDS`` names the fields.
        base: ``name`` and ``fingerprint`` of the model it belongs to.
        library_version: the wise-ext that wrote it.
        checksum: stands for the whole content: equal checksums, equal memories.
    """

    memory: SideMemory
    config: dict[str, Any]
    ledger: list[dict[str, Any]]
    base: dict[str, Any]
    library_version: str
    checksum: str


def save_memory(
    directory: str | Path,
    memory: SideMemory,
    config: Mapping[str, Any],
    ledger: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    journal: Journal | None = None,
) -> None:
    """Write a memory directory as a whole: whatever happens, it holds the old memory or the new.

    Args:
        directory: created where it is missing; other files in it are left alone.
        memory: what to save.
        config: the settings, JSON-able.
        ledger: one entry an edit, JSON-able.
        base: ``name`` and ``fingerprint`` of the model.
        journal: the journal of the editing run that ends with this save: it is removed in the
            same instant at which the new memory counts.

    Raises:
        StorageError: a value has no JSON form, or the disk refuses; the old memory is unharmed.
    """
    folder = Path(directory)
    tensors = encoding.encode_tensors(memory.state_tensors())
    lines = encoding.encode_ledger(ledger)
    head = encoding.encode_config(config, memory.state_meta(), base, tensors, lines)
    files = {TENSORS: tensors, LEDGER: lines, CONFIG: head}
    with explained("save the memory in", folder):
        commit(folder, files, ends_journal=journal is not None)
    if journal is not None:
        journal.close()


def load_memory_dir(directory: str | Path) -> StoredMemory:
    """Read a memory directory; nothing is unpickled, nothing is written.

    Raises:
        StorageError: the directory is missing, of another format version, damaged or incomplete;
            the message names the file, the cause and the cure.
    """
    folder = Path(directory)
    config = read_config(folder)
    for _ in range(_RETRIES):
        try:
            return _load(folder, config)
        except StorageError:
            # A save between two of our reads mixes old and new: then the checksum has moved on.
            latest = read_config(folder)
            if latest["checksum"] == config["checksum"]:
                raise
            config = latest
    return _load(folder, config)


def holds_memory(directory: str | Path) -> bool:
    """Say whether a directory holds a saved memory, sound or not.

    Raises:
        StorageError: the directory cannot be read.
    """
    folder = Path(directory)
    try:
        with explained("look into", folder):
            read_committed(folder, CONFIG)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return False
        raise
    return True


def check_base(stored: Mapping[str, Any], fingerprint: str, name: str) -> None:
    """Check that a memory belongs to a model.

    Args:
        stored: the memory's ``base``.
        fingerprint: the model's.
        name: the model's, for the message.

    Raises:
        StorageError: it belongs to another one.
    """
    if stored.get("fingerprint") != fingerprint:
        same = " (of the same name, but with other weights)" if stored.get("name") == name else ""
        raise StorageError(
            f"the memory was made for {stored.get('name')!r} [{stored.get('fingerprint')}], this "
            f"model is {name!r} [{fingerprint}]{same}: load the memory's own base model"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check ``wise_config.json``.

    Raises:
        StorageError: see ``load_memory_dir``.
    """
    return encoding.decode_config(bytes(read_file(folder, CONFIG)), str(folder))


def read_file(folder: Path, name: str) -> Content:
    """Read one file of a memory directory.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    try:
        with explained("read", folder / name):
            return read_committed(folder, name)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
    if not folder.is_dir():
        raise StorageError(f"{folder} is not a memory directory: there is no such folder")
    if name == CONFIG and has_journal(folder):
        raise StorageError(
            f"{folder} holds an unfinished editing run and no memory yet: finish it with --resume"
        )
    cause = "it is not a memory directory" if name == CONFIG else "restore it, or edit again"
    raise StorageError(f"{name} is missing in {folder}: {cause}")


def build_memory(data: Content, meta: Mapping[str, Any], folder: Path) -> SideMemory:
    """Put the memory together from its tensors and their description.

    Raises:
        StorageError: they do not fit each other.
    """
    tensors = encoding.decode_tensors(data, f"{TENSORS} in {folder}")
    try:
        return SideMemory.from_state(tensors, meta)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"{TENSORS} in {folder} is inconsistent: {reason}") from error


def _load(folder: Path, config: dict[str, Any]) -> StoredMemory:
    data = {name: read_file(folder, name) for name in (TENSORS, LEDGER)}
    for name, content in data.items():
        encoding.check_digest(name, content, config["files"][name], str(folder))
    return StoredMemory(
        build_memory(data[TENSORS], config["memory"], folder),
        config["settings"],
        encoding.decode_ledger(bytes(data[LEDGER]), str(folder)),
        config["base"],
        config["library_version"],
        config["checksum"],
    )
