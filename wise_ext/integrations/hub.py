"""Memories to and from a hub repository, or a plain folder that many can read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import StorageError
from ..storage import StoredMemory, holds_memory, load_memory_dir, new_folder, verify
from ..storage.commit import FILES, commit, has_journal
from ..storage.directory import read_file
from ..storage.files import explained, write_durably
from .card import CARD, base_line, card_of, edits_table, metrics_table


def push(
    directory: str | Path,
    target: str,
    *,
    report: Mapping[str, Any] | None = None,
    private: bool = True,
    message: str = "Upload a wise-ext memory",
) -> str:
    """Copy a memory to a hub repository or a folder, with a model card.

    On a hub it is one commit, in a folder one save: who reads sees the old memory or the new one.

    Args:
        directory: a saved memory; it has to pass ``verify``.
        target: ``owner/name`` on the hub, or a folder (a path that begins with ``/``, ``.`` or
            ``~``, or one that exists): new, empty, or one that holds a memory.
        report: what ``wise-ext eval --json`` wrote, for the card.
        private: whether a repository that is made now can be seen by its owner alone.
        message: of the hub's commit.

    Returns:
        Where it is: the commit's address, or the folder.

    Raises:
        StorageError: the memory is damaged, or the hub or the disk refuses.
    """
    folder = Path(directory)
    _check(folder)
    files = {name: bytes(read_file(folder, name)) for name in FILES}
    card = memory_card(load_memory_dir(folder), target, report)
    place = local_folder(target)
    if place is not None:
        _write(place, files, card)
        return str(place)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
        for name, data in (*files.items(), (CARD, card.encode()))
    ]
    with _hub_errors(f"push to {target}"):
        api = HfApi()
        api.create_repo(target, private=private, exist_ok=True)
        return str(api.create_commit(target, operations, commit_message=message).commit_url)


def pull(source: str, directory: str | Path, *, revision: str | None = None) -> StoredMemory:
    """Bring a memory from a hub repository or a folder; it is verified before it appears.

    Args:
        source: ``owner/name`` on the hub, or a folder; see ``push``.
        directory: a new folder, or an empty one.
        revision: a branch, tag or commit of the hub repository.

    Returns:
        The memory.

    Raises:
        StorageError: there is none, it is damaged, or the directory is not empty.
    """
    place = local_folder(source)
    if place is not None and revision is not None:
        raise StorageError(
            f"{source} is a folder, which has no revision {revision!r}: leave it out"
        )
    with new_folder(Path(directory)) as making:
        files = _from_hub(source, revision) if place is None else _from_folder(place)
        for name, data in files.items():
            (making / name).write_bytes(data)
        _check(making, source)
    return load_memory_dir(directory)


def local_folder(name: str) -> Path | None:
    """The folder that a name means; None where it means a hub repository."""
    path = Path(name).expanduser()
    is_path = name.startswith(("/", ".", "~")) or path.exists() or name.count("/") != 1
    return path if is_path else None


def memory_card(stored: StoredMemory, name: str, report: Mapping[str, Any] | None = None) -> str:
    """The model card of a memory: base model, how to use it, metrics and edits."""
    memory = stored.memory
    base = str(stored.base.get("name"))
    parts = [
        "# Edits of a language model\n",
        f"A wise-ext memory of {len(stored.ledger)} edits (shards: {len(memory.shards)}) beside "
        f"`{memory.layer}`, found by the {memory.routing} router. The base model's weights are not "
        f"part of it.\n\n{base_line(stored.base)}",
        f"```\nwise-ext pull {name} my-edits\n"
        f'wise-ext generate {base} --memory my-edits --prompt "…" --show-route\n```\n',
    ]
    if report is not None:
        parts.append(f"## Metrics\n\nOf `wise-ext eval`.\n\n{metrics_table(report)}")
    parts.append(f"## Edits\n\n{edits_table(stored.ledger)}")
    return card_of(stored.base, "\n".join(parts))


def _check(folder: Path, name: str | Path | None = None) -> None:
    wrong = [check for check in verify(folder) if not check.ok]
    if wrong:
        where = name or folder
        raise StorageError(f"{where} is no sound memory: {wrong[0].name}: {wrong[0].detail}")


def _write(place: Path, files: Mapping[str, bytes], card: str) -> None:
    with explained("look into", place):
        replaces = place.is_dir() and any(place.iterdir())
    if not replaces:
        with new_folder(place) as making:
            for name, data in (*files.items(), (CARD, card.encode())):
                (making / name).write_bytes(data)
        return
    if not holds_memory(place) or has_journal(place):
        what = "an unfinished editing run" if has_journal(place) else "something else"
        raise StorageError(f"{place} holds {what}: push to a new folder, or to one of a memory")
    with explained("push to", place):
        commit(place, files, ends_journal=False)
        write_durably(place / f".{CARD}.new", card.encode())
        (place / f".{CARD}.new").replace(place / CARD)


def _from_folder(place: Path) -> dict[str, bytes]:
    files = {name: bytes(read_file(place, name)) for name in FILES}
    with explained("read", place / CARD):
        if (place / CARD).is_file():
            files[CARD] = (place / CARD).read_bytes()
    return files


def _from_hub(name: str, revision: str | None) -> dict[str, bytes]:
    files = {}
    with _hub_errors(f"pull {name}"), tempfile.TemporaryDirectory() as scratch:
        api = HfApi()
        info = api.model_info(name, revision=revision)  # all files of one commit
        there = {sibling.rfilename for sibling in info.siblings or ()}
        for file in (*FILES, CARD):
            if file in there:
                path = api.hf_hub_download(name, file, revision=info.sha, local_dir=scratch)
                files[file] = Path(path).read_bytes()
    return files


@contextmanager
def _hub_errors(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # those of the hub's client and of what it speaks HTTP with
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else type(error).__name__
        raise StorageError(
            f"cannot {action}: {reason}: check the name, the connection and 'hf auth login'; a "
            "folder's path begins with ./ or /"
        ) from error
