"""Replacing the three files of a memory directory as one.

A file can be renamed atomically, three files cannot. So a save

1. writes all files, synced, into ``.saving/`` (a crash here leaves the old memory as it was);
2. renames ``.saving`` to ``.staged``: the instant at which the new memory counts;
3. moves the files one by one out of ``.staged/``, the configuration last, and removes the folder.

Who reads takes a file from ``.staged/`` while it is there, else from the directory itself, and so
sees the new memory from the rename on, wherever step 3 was interrupted. The next save finishes
what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wise_ext.storage.files import (
    Content,
    discard_folder,
    make_folder,
    map_file,
    sync_folder,
    undone_on_failure,
    write_durably,
)

CONFIG = "wise_config.json"
TENSORS = "side_memory.safetensors"
LEDGER = "edits.jsonl"
FILES = (TENSORS, LEDGER, CONFIG)
JOURNAL = "journal"

_SAVING = ".saving"
_STAGED = ".staged"
_FINISHED = ".journal-finished"
# Staged beside the files when the save ends an editing run: its journal goes with the commit.
_ENDS_JOURNAL = "ends-journal"


def commit(directory: Path, files: Mapping[str, bytes], ends_journal: bool) -> None:
    """Replace the memory in a directory, which is created where it is missing.

    Args:
        directory: the memory directory.
        files: the content of each of ``FILES``.
        ends_journal: remove the directory's journal in the same instant.

    Raises:
        OSError: the disk refuses. Before the instant of step 2 nothing has changed then.
    """
    made = make_folder(directory)
    saving = directory / _SAVING
    with undone_on_failure(made, saving):
        settle(directory)
        discard_folder(saving)
        saving.mkdir()
        for name in FILES:
            write_durably(saving / name, files[name])
        if ends_journal:
            write_durably(saving / _ENDS_JOURNAL, b"")
        sync_folder(saving)
        saving.rename(directory / _STAGED)
    sync_folder(directory)
    settle(directory)


def settle(directory: Path) -> None:
    """Finish step 3 of an interrupted commit; does nothing where there is none."""
    staged = directory / _STAGED
    if not staged.is_dir():
        return
    if (staged / _ENDS_JOURNAL).exists():
        retire_journal(directory)
        (staged / _ENDS_JOURNAL).unlink()
    for name in FILES:
        if (staged / name).exists():
            (staged / name).replace(directory / name)
    sync_folder(directory)
    staged.rmdir()
    sync_folder(directory)


def retire_journal(directory: Path) -> None:
    """Remove the journal: by one rename first, so that there is never half a journal."""
    finished = directory / _FINISHED
    discard_folder(finished)
    if (directory / JOURNAL).is_dir():
        (directory / JOURNAL).rename(finished)
        sync_folder(directory)
        discard_folder(finished)


def has_journal(directory: Path) -> bool:
    """Say whether an editing run has not come to its end here."""
    ended = (directory / _STAGED / _ENDS_JOURNAL).exists()
    return (directory / JOURNAL).is_dir() and not ended


def read_committed(directory: Path, name: str) -> Content:
    """Return a file of the memory that counts, without changing anything; the tensors mapped.

    Raises:
        OSError: it cannot be read (``FileNotFoundError``: it is not there).
    """
    read = map_file if name == TENSORS else Path.read_bytes
    try:
        return read(directory / _STAGED / name)
    except (FileNotFoundError, NotADirectoryError):
        return read(directory / name)
