"""A folder of files that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wise_ext.errors import StorageError
from wise_ext.storage.files import explained, make_folder, sync_file, sync_folder, undone_on_failure


def check_new(out: Path) -> None:
    """Refuse a place for a new folder that has something in it.

    Raises:
        StorageError: it is a file, or a folder that is not empty.
    """
    with explained("look into", out):
        if out.exists() and any(out.iterdir()):
            raise StorageError(f"{out} is not empty: name a new folder, or an empty one")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; it becomes ``out`` when the block has come to its end.

    Args:
        out: a new folder, or an empty one; its parents are made.

    Raises:
        StorageError: ``out`` is not empty, or the disk refuses. Nothing is left behind then, nor
            when the block raises.
    """
    check_new(out)
    with explained("write", out):
        made = make_folder(out.parent)
        with undone_on_failure(made):
            making = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            try:
                yield making
                _sync(making)
                making.chmod(0o755)  # mkdtemp made it private
                if out.exists():
                    out.rmdir()
                making.rename(out)
                sync_folder(out.parent)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path) if path.is_dir() else sync_file(path)
