"""What a lifelong run keeps on the disk, so that it may be killed at any instant.

::

    DIR/run.json            what is run: the settings that must not change, and the run's own id
        lock                held by the process that works on it
        memory/             the editor's: the memory and, while a call runs, its journal
        calls.jsonl         finished calls of the editor: which edits, what they cost
        running.json        the call in progress, and the CPU seconds it has cost so far
        scores/             rows of edits that are scored already, a file a part of a checkpoint
        rows/               finished rows, one a checkpoint, also in the results file

Every file is replaced as a whole or appended to by one line; a line that was cut short is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import Row
from wise_ext.errors import StorageError

_BEAT_SECONDS = 2.0


@dataclass(frozen=True)
class Call:
    """Edits ``start`` to ``end`` of the pool, given to the editor at once, and what that cost."""

    start: int
    end: int
    cpu: float = 0.0
    seconds: float = 0.0


class RunState:
    """The folder of one run; see above.

    Args:
        folder: made where it is missing.
        settings: what makes it this run, JSON-able.

    Raises:
        StorageError: it holds another run, another process works on it, or the disk refuses.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        try:
            for name in ("scores", "rows"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"cannot work in {folder} ({error.strerror}): name another folder by --work"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.run = self._take_up(json.loads(json.dumps(settings)))
        except BlockingIOError:
            os.close(self._lock)
            raise StorageError(
                f"another process works in {folder}: wait for it, or choose another --name"
            ) from None
        except StorageError:
            os.close(self._lock)
            raise
        self.calls = [Call(**line) for line in read_lines(folder / "calls.jsonl")]

    def _take_up(self, settings: dict[str, Any]) -> str:
        """The id of the run in the folder, which is to be this one."""
        stored = _read(self.folder / "run.json")
        if stored is None:
            stored = {"run": uuid.uuid4().hex[:12], "settings": settings}
            replace_file(self.folder / "run.json", stored)
        elif stored["settings"] != settings:
            raise StorageError(
                f"{self.folder} holds another run: {_difference(stored['settings'], settings)}; "
                f"choose another --name or --work, or remove {self.folder}"
            )
        return str(stored["run"])

    @property
    def memory(self) -> Path:
        """Where the editor keeps its memory."""
        return self.folder / "memory"

    def close(self) -> None:
        """Let another process work here."""
        os.close(self._lock)

    # -- editing -----------------------------------------------------------------------------------

    def unfinished(self) -> Call | None:
        """The call that was running when the run was last stopped, with its cost until then."""
        stored = _read(self.folder / "running.json")
        call = None if stored is None else Call(**stored)
        return call if call is not None and call.start >= self.edited else None

    @property
    def edited(self) -> int:
        """How many edits the finished calls made."""
        return self.calls[-1].end if self.calls else 0

    def begin(self, call: Call) -> Callable[[], None]:
        """A call starts (again). Returns what to call now and then, to note what it has cost."""
        began = time.process_time(), time.perf_counter()
        noted = -_BEAT_SECONDS
        replace_file(self.folder / "running.json", vars(call))

        def beat() -> None:
            nonlocal noted
            wall = time.perf_counter() - began[1]
            if wall - noted < _BEAT_SECONDS:
                return
            noted = wall
            cpu = time.process_time() - began[0]
            so_far = Call(call.start, call.end, call.cpu + cpu, call.seconds + wall)
            replace_file(self.folder / "running.json", vars(so_far))

        return beat

    def finish(self, call: Call) -> None:
        """A call has ended, its edits are in the memory."""
        append_line(self.folder / "calls.jsonl", vars(call))
        self.calls.append(call)

    def cost(self, start: int, end: int) -> tuple[float, float]:
        """CPU and wall seconds of the calls that made the edits from ``start`` to ``end``."""
        own = [call for call in self.calls if start <= call.start and call.end <= end]
        return sum(call.cpu for call in own), sum(call.seconds for call in own)

    # -- scoring -----------------------------------------------------------------------------------

    def part(self, name: str) -> Any:
        """A part of a checkpoint's scores, or None where it is not there yet."""
        return _read(self.folder / "scores" / f"{name}.json")

    def keep_part(self, name: str, content: Any) -> None:
        """Keep a part of a checkpoint's scores."""
        replace_file(self.folder / "scores" / f"{name}.json", content)

    def row(self, edits: int) -> Row | None:
        """The finished row of a checkpoint."""
        row: Row | None = _read(self.folder / "rows" / f"{edits}.json")
        return row

    def keep_row(self, edits: int, row: Row) -> None:
        """Finish a checkpoint; its parts are no longer needed."""
        replace_file(self.folder / "rows" / f"{edits}.json", row)
        for path in (self.folder / "scores").glob(f"{edits}-*.json"):
            path.unlink()

    def rows(self) -> list[Row]:
        """All finished rows, by T."""
        paths = sorted((self.folder / "rows").glob("*.json"), key=lambda path: int(path.stem))
        return [row for path in paths if (row := _read(path)) is not None]


def publish(file: Path, row: Row) -> bool:
    """Append a row to a results file, unless it is there.

    A row is known by its run and T. Returns whether it was added.

    Raises:
        StorageError: the file cannot be written.
    """
    known = {(line.get("run"), line.get("T")) for line in read_lines(file)}
    if (row["run"], row["T"]) in known:
        return False
    append_line(file, row)
    return True


def append_line(file: Path, content: Any) -> None:
    """Add one JSON line, at once and on the disk; a line cut short before it goes.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _append(handle, file.read_bytes, (json.dumps(content) + "\n").encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(
            f"cannot add a line to {file} ({error.strerror}): make it writable, and start the same "
            "command again"
        ) from error


def _append(handle: int, read: Callable[[], bytes], data: bytes) -> None:
    fcntl.flock(handle, fcntl.LOCK_EX)
    old = read()
    whole = old.rfind(b"\n") + 1
    if whole < len(old):
        if _parsed(old[whole:]) is None:
            os.ftruncate(handle, whole)
        else:  # whole but for its line feed, as an editor may leave it
            data = b"\n" + data
    os.write(handle, data)
    os.fsync(handle)


def read_lines(file: Path) -> list[Any]:
    """The JSON lines of a file that are whole; none where there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    found = [_parsed(line.encode()) for line in lines if line.strip()]
    return [line for line in found if line is not None]


def replace_file(path: Path, content: Any) -> None:
    """Write a JSON file so that it is the old one or the new one, whatever happens.

    Raises:
        StorageError: the disk refuses.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path} ({error.strerror}): free some space, and start the same command "
            "again"
        ) from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise StorageError(
            f"{path} is damaged: remove {path.parent} to start the run over"
        ) from None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if was != now:
            if isinstance(was, dict) and isinstance(now, dict):
                return _difference(was, now)
            return f"its {key} is {was!r}, not {now!r}"
    return "it differs"
