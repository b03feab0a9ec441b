"""The journal of an editing run: what is done so far, so that a killed run can go on.

::

    DIR/journal/header.json                 what is being run: settings, model, edits, the memory
                                            that it started from
                steps.jsonl                 one line a finished step, or several
                                            of one shard that came together
                state-000041.safetensors    the open state after the latest step
                kept-000007.safetensors     tensors that a step leaves for good (a sealed shard, …)

A step counts from the instant at which its line is whole: the tensors it names are on the disk by
then, and those of the step before are removed only afterwards. A line carries a hash of itself, of
the lines before it and of its tensors, so a line that was cut short is recognised and dropped, and
damage anywhere else is refused.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from wise_ext.errors import StorageError
from wise_ext.storage.commit import JOURNAL, has_journal, retire_journal, settle
from wise_ext.storage.encoding import canonical, encode_tensors
from wise_ext.storage.files import (
    discard_folder,
    explained,
    make_folder,
    sha256,
    sync_folder,
    undone_on_failure,
    write_all,
    write_durably,
)
from wise_ext.storage.journal_reader import (
    HEADER,
    STEPS,
    JournalState,
    Tail,
    compare_header,
    damaged,
    make_header,
    make_line,
    named_files,
    plain,
    read_state,
    read_tail,
    tensor_files,
)

_NEW = ".journal-new"


class Journal:
    """A journal that is open for recording; one process at a time.

    Made by ``Journal.open`` or ``Journal.resume``. May be used as a context manager, which closes
    it (and leaves it on the disk).
    """

    def __init__(self, directory: Path, handle: int, tail: Tail) -> None:
        self._directory = directory
        self._folder = directory / JOURNAL
        self._handle: int | None = handle
        self._tail = tail

    @classmethod
    def open(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        base: Mapping[str, Any],
        edits: str = "",
        discard: bool = False,
    ) -> Journal:
        """Start a run in a memory directory, which is created where it is missing.

        Args:
            directory: the memory directory.
            config: the run's settings, JSON-able.
            base: ``name`` and ``fingerprint`` of the model.
            edits: digest of the edits to make (``digest_edits``).
            discard: throw an unfinished run's journal away instead of refusing.

        Raises:
            StorageError: an unfinished run is there, or the disk refuses.
        """
        where = Path(directory)
        with explained("start a journal in", where):
            made = make_folder(where)
            with undone_on_failure(made, where / _NEW):
                settle(where)
                if (where / JOURNAL).exists() and not discard:
                    raise StorageError(
                        f"{where} holds an unfinished editing run: continue it with --resume, or "
                        f"remove {where / JOURNAL} to start over"
                    )
                retire_journal(where)
                discard_folder(where / _NEW)
                (where / _NEW).mkdir()
                header = canonical(make_header(where, config, base, edits))
                write_durably(where / _NEW / HEADER, header)
                write_durably(where / _NEW / STEPS, b"")
                sync_folder(where / _NEW)
                (where / _NEW).rename(where / JOURNAL)
                sync_folder(where)
                handle = _lock(where)
        return cls(where, handle, Tail((), 0, sha256(header)))

    @classmethod
    def resume(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        base: Mapping[str, Any],
        edits: str = "",
    ) -> Journal:
        """Take up an unfinished run; ``state`` then says where it was.

        Args:
            directory: as for ``open``, like the others.
            config: must be what the run was started with, like ``base`` and ``edits``.
            base: see ``config``.
            edits: see ``config``.

        Raises:
            StorageError: there is no unfinished run, something differs (the message says what),
                the journal is damaged, or another process holds it.
        """
        where = Path(directory)
        with explained("resume the run in", where):
            settle(where)
            if not has_journal(where):
                raise StorageError(f"{where} holds no unfinished run: start without --resume")
            handle = _lock(where)
            try:
                header = (where / JOURNAL / HEADER).read_bytes()
                compare_header(where, header, make_header(where, config, base, edits))
                tail = read_tail(where / JOURNAL)
                os.ftruncate(handle, tail.length)
                os.fsync(handle)
                # Tensors of a step in flight, and states that a later one replaced.
                for path in tensor_files(where / JOURNAL):
                    if path.name not in named_files(tail):
                        path.unlink()
            except FileNotFoundError:
                os.close(handle)
                raise damaged(where / JOURNAL, HEADER) from None
            except BaseException:
                os.close(handle)
                raise
        return cls(where, handle, tail)

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Say whether a directory holds an unfinished run."""
        return has_journal(Path(directory))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def num_steps(self) -> int:
        """How many steps are recorded."""
        return len(self._tail.entries)

    def record(
        self,
        step: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record a finished step; when this returns, a crash no longer loses it.

        Args:
            step: what was done, JSON-able.
            tensors: the open state after it; replaces that of the step before.
            kept: tensors to keep until the journal ends, besides those of other steps.

        Raises:
            StorageError: the disk refuses. The step is then not recorded, the ones before are.
        """
        handle = self._open_handle()
        number = self.num_steps
        files = {"state": encode_tensors(tensors)}
        if kept is not None:
            files["kept"] = encode_tensors(kept)
        named = {
            kind: {"file": f"{kind}-{number:06d}.safetensors", "sha256": sha256(data)}
            for kind, data in files.items()
        }
        entry = plain({"step": dict(step), "tensors": named})
        line, digest = make_line(entry, self._tail.digest)
        length = self._tail.length
        with explained("record an edit in", self._folder):
            try:
                if os.fstat(handle).st_size != length:
                    # An earlier failure could not be undone then.
                    os.ftruncate(handle, length)
                    os.fsync(handle)
                for kind, data in files.items():
                    write_durably(self._folder / named[kind]["file"], data)
                sync_folder(self._folder)
                os.lseek(handle, length, os.SEEK_SET)
                write_all(handle, line)
                os.fsync(handle)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(handle, length)
                    os.fsync(handle)
                    for content in named.values():
                        (self._folder / content["file"]).unlink(missing_ok=True)
                raise
        before = self._tail.entries[-1:]
        self._tail = Tail((*self._tail.entries, entry), length + len(line), digest)
        for last in before:
            with suppress(OSError):
                (self._folder / last["tensors"]["state"]["file"]).unlink()

    def state(self) -> JournalState | None:
        """Return where the run is; None before its first step.

        Raises:
            StorageError: a file of tensors is missing or damaged.
        """
        return read_state(self._folder, self._tail)

    def close(self) -> None:
        """Stop recording and leave the journal for ``resume``."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def finish(self) -> None:
        """Remove the journal: the run is at its end.

        ``save_memory(…, journal=journal)`` does this in one instant with the save.

        Raises:
            StorageError: the disk refuses.
        """
        self.close()
        with explained("remove the journal in", self._directory):
            retire_journal(self._directory)

    def _open_handle(self) -> int:
        if self._handle is None:
            raise StorageError(f"the journal in {self._directory} is closed: resume it first")
        return self._handle


def _lock(where: Path) -> int:
    try:
        handle = os.open(where / JOURNAL / STEPS, os.O_RDWR)
    except FileNotFoundError:
        raise damaged(where / JOURNAL, STEPS) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StorageError(
            f"another process is editing into {where}: wait for it, or choose another folder"
        ) from None
    except OSError:
        # Some network file systems know no locks: then nobody can hold one either.
        pass
    return handle
