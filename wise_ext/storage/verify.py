"""Checking a memory directory from end to end, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wise_ext.errors import StorageError
from wise_ext.memory.side_memory import SideMemory
from wise_ext.storage.commit import CONFIG, JOURNAL, LEDGER, TENSORS, has_journal
from wise_ext.storage.directory import build_memory, read_config, read_file
from wise_ext.storage.encoding import LEDGER_FIELDS, check_digest, decode_ledger
from wise_ext.storage.files import Content
from wise_ext.storage.journal_reader import read_state, read_tail


class Check(NamedTuple):
    """The outcome of one check; ``detail`` says what was found."""

    name: str
    ok: bool
    detail: str


def verify(directory: str | Path) -> list[Check]:
    """Check everything that can be checked about a memory directory.

    Files and their hashes, the format version, shapes and masks against values, finite numbers,
    the ledger's fields, ledger and shards and keys against each other, an unfinished run.

    Returns:
        The checks in order; what depends on a failed one is left out. Changes nothing.
    """
    folder = Path(directory)
    checks: list[Check] = []

    def run(name: str, check: Callable[[], tuple[Any, str]]) -> Any:
        try:
            found, detail = check()
        except StorageError as error:
            checks.append(Check(name, False, str(error)))
            return None
        checks.append(Check(name, True, detail))
        return found

    config = run(CONFIG, lambda: _config(folder))
    if config is not None:
        tensors = run(TENSORS, lambda: _file(folder, TENSORS, config))
        lines = run(LEDGER, lambda: _file(folder, LEDGER, config))
        memory = ledger = None
        if tensors is not None:
            memory = run("shards", lambda: _memory(folder, tensors, config))
        if lines is not None:
            ledger = run("ledger", lambda: _ledger(folder, bytes(lines)))
        if memory is not None:
            run("keys", lambda: _keys(memory))
        if memory is not None and ledger is not None:
            run("ledger and shards agree", lambda: _agree(memory, ledger))
    run("journal", lambda: _journal(folder))
    return checks


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    config = read_config(folder)
    base = config["base"].get("name")
    return config, f"format version {config['format_version']}, base model {base!r}"


def _file(folder: Path, name: str, config: dict[str, Any]) -> tuple[Content, str]:
    data = read_file(folder, name)
    check_digest(name, data, config["files"][name], str(folder))
    return data, f"{len(data)} bytes, hash as recorded"


def _memory(folder: Path, data: Content, config: dict[str, Any]) -> tuple[SideMemory, str]:
    memory = build_memory(data, config["memory"], folder)
    for index, shard in enumerate(memory.shards):
        if not bool(shard.values.isfinite().all()):
            raise StorageError(f"shard {index} holds values that are not finite: edit again")
    entries = sum(shard.nnz for shard in memory.shards)
    return memory, f"{len(memory.shards)} shards of {memory.shape}, {entries} entries"


def _ledger(folder: Path, data: bytes) -> tuple[list[dict[str, Any]], str]:
    ledger = decode_ledger(data, str(folder))
    for number, entry in enumerate(ledger, 1):
        missing = [name for name in LEDGER_FIELDS if name not in entry]
        if missing:
            raise StorageError(f"{LEDGER} in {folder}, line {number} lacks {', '.join(missing)}")
    twice = [name for name, count in Counter(e["id"] for e in ledger).items() if count > 1]
    if twice:
        raise StorageError(f"{LEDGER} in {folder} names these edits twice: {_few(twice)}")
    return ledger, f"{len(ledger)} edits"


def _keys(memory: SideMemory) -> tuple[bool, str]:
    index = memory.key_index
    if index is None:
        return True, "no key index"
    # Keys are whole numbers; what they are compared through is not.
    compared_through = (index.mean, index.scale, *index.relations)
    if not all(bool(tensor.isfinite().all()) for tensor in compared_through):
        raise StorageError("the key index compares by numbers that are not finite: edit again")
    homes = {name: place for place, s in enumerate(memory.shards) for name in s.edit_ids}
    pairs = zip(index.ids, index.shards.tolist(), strict=True)
    wrong = [name for name, shard in pairs if homes.get(name) != shard]
    if wrong:
        raise StorageError(f"keys point to shards that do not hold their edits: {_few(wrong)}")
    unkeyed = sorted(homes.keys() - set(index.ids)) if memory.routing == "key" else []
    if unkeyed:
        raise StorageError(f"edits without a key, which no prompt can reach: {_few(unkeyed)}")
    return True, f"{len(set(index.ids))} edits by {len(index.tokens)} keys of {index.width} numbers"


def _agree(memory: SideMemory, ledger: list[dict[str, Any]]) -> tuple[bool, str]:
    told = Counter((e["id"], e["shard"]) for e in ledger if e["shard"] is not None)
    held = Counter((n, place) for place, s in enumerate(memory.shards) for n in s.edit_ids)
    for difference, text in (
        (told - held, "named in the ledger, absent from their shard"),
        (held - told, "held by a shard, absent from the ledger"),
    ):
        if difference:
            raise StorageError(f"edits {text}: {_few([name for name, _ in difference])}")
    return True, f"{sum(held.values())} edits in their shards"


def _journal(folder: Path) -> tuple[bool, str]:
    if not has_journal(folder):
        return True, "no unfinished run"
    tail = read_tail(folder / JOURNAL)
    read_state(folder / JOURNAL, tail)
    return True, f"an unfinished run of {len(tail.entries)} steps: continue it with --resume"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
