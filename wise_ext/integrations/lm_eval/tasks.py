"""The harness's tasks by file, folder or name; a data file lies beside the YAML that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.tasks import TaskManager

from ...errors import DataError

#: where the tasks lie that come with this package
PACKAGED = Path(str(resources.files("wise_ext").joinpath("data/lm_eval")))


def load_tasks(wanted: Sequence[str] = ()) -> dict[str, Any]:
    """Build tasks of the harness.

    Relative ``data_files`` of a task are looked for beside its YAML file. (The harness looks in the
    working directory, which is therefore another one while this runs.)

    Args:
        wanted: YAML files, folders of them, or names: of the package's own tasks first, else of
            the harness's. None at all: all of the package's own.

    Returns:
        Tasks by name; of a group or a tag its members.

    Raises:
        DataError: there is no such task, or its file or data cannot be read.
    """
    tasks: dict[str, Any] = {}
    for spec in wanted or [str(PACKAGED)]:
        for source in _sources(spec):
            try:
                with contextlib.chdir(source.folder):
                    tasks |= source.manager.load(source.name)["tasks"]
            except Exception as error:  # the harness, its YAML reader and `datasets` have their own
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise DataError(
                    f"task {spec}: {lines[0][:300]}: check its YAML and data"
                ) from error
    return tasks


class _Source(NamedTuple):
    """A task (a name or a file), who can build it, and where its data files are looked for."""

    manager: Any
    name: str
    folder: Path


def _sources(spec: str) -> Iterator[_Source]:
    path = Path(spec)
    if path.is_dir():
        manager = _manager(path)
        if not manager.all_subtasks:
            raise DataError(f"no task in {spec}: put a YAML file with 'task:' there")
        for name in manager.all_subtasks:
            yield _Source(manager, name, _folder(manager, name))
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"no such task file: {spec}")
        yield _Source(_manager(path.parent), str(path.resolve()), path.parent)
    else:
        own = _manager(PACKAGED)
        manager = own if spec in own.task_index else TaskManager()
        if spec not in manager.task_index:
            raise DataError(
                f"no task {spec!r}: give a YAML file, a folder of them, the name of a task that "
                f"lm_eval has, or one of {', '.join(own.all_subtasks)}"
            )
        yield _Source(manager, spec, _folder(manager, spec))


def _manager(folder: Path) -> Any:
    return TaskManager(include_path=folder.resolve(), include_defaults=False)


def _folder(manager: Any, name: str) -> Path:
    where = manager.task_index[name].yaml_path  # a tag has none
    return Path.cwd() if where is None else Path(where).parent
