"""Which memory a server is given, and what of vLLM can be used with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wise_ext.errors import ConfigError, StorageError
from wise_ext.storage import StoredMemory, load_memory_dir

VARIABLE = "WISE_EXT_MEMORY"
#: Our key in ``--additional-config``, and in the extra arguments of a request.
NAME = "wise_ext"

# Where vLLM keeps a setting, what it has to be, and what the user calls it.
_NEEDED: tuple[tuple[str, str, Any, str], ...] = (
    ("model_config", "runner_type", "generate", "pooling models (--runner pooling)"),
    ("model_config", "quantization", None, "quantised models (--quantization)"),
    ("parallel_config", "tensor_parallel_size", 1, "--tensor-parallel-size above 1"),
    ("parallel_config", "pipeline_parallel_size", 1, "--pipeline-parallel-size above 1"),
    ("parallel_config", "prefill_context_parallel_size", 1, "prefill context parallelism"),
    ("parallel_config", "decode_context_parallel_size", 1, "decode context parallelism"),
    ("parallel_config", "use_ubatching", False, "--enable-dbo and --ubatch-size"),
    ("speculative_config", "enable_adaptive_verification", False, "adaptive verification"),
)


@dataclass(frozen=True)
class Served:
    """A memory in service.

    Attributes:
        directory: where it is, absolute.
        stored: what it holds.
    """

    directory: Path
    stored: StoredMemory

    @property
    def summary(self) -> str:
        """One line for the log."""
        memory = self.stored.memory
        edits, shards = len(memory.edit_ids), len(memory.shards)
        return f"{edits} edits ({shards=}) at '{memory.layer}', from {self.directory}"


def memory_directory(additional: Any, environment: Mapping[str, str]) -> Path | None:
    """The directory that a server is to use; None where none is named.

    Args:
        additional: vLLM's ``additional_config``; ``{"wise_ext": {"memory": DIR}}`` comes before
            the environment.
        environment: ``WISE_EXT_MEMORY`` counts.

    Raises:
        ConfigError: the setting has another form.
    """
    given = additional.get(NAME) if isinstance(additional, dict) else None
    if given is None:
        named = environment.get(VARIABLE)
        return Path(named).expanduser().absolute() if named else None
    unknown = set(given) - {"memory", "checksum"} if isinstance(given, dict) else {"no object"}
    if unknown or not isinstance(given.get("memory"), str) or not given["memory"]:
        raise ConfigError(
            f"--additional-config has {NAME}={given!r}: "
            f'give {{"{NAME}": {{"memory": "DIRECTORY"}}}}'
        )
    return Path(given["memory"]).expanduser().absolute()


def serve(config: Any, environment: Mapping[str, str] = os.environ) -> Served | None:
    """Read the memory that a server is to use and note it in vLLM's configuration, so that workers
    find it, and code compiled for one memory is not taken for another's.

    Args:
        config: a ``VllmConfig``.
        environment: see ``memory_directory``.

    Returns:
        None where no memory is named.

    Raises:
        ConfigError: vLLM is set to something that a memory cannot be used with.
        StorageError: see ``load_memory_dir``.
    """
    directory = memory_directory(config.additional_config, environment)
    if directory is None:
        return None
    _check(config)
    served = Served(directory, load_memory_dir(directory))
    noted = {"memory": str(directory), "checksum": served.stored.checksum}
    config.additional_config = {**config.additional_config, NAME: noted}
    return served


def served_here(config: Any) -> Served | None:
    """The memory that ``serve`` noted, read in a worker's process.

    Raises:
        StorageError: see ``load_memory_dir``, or it is no longer the one that was noted.
    """
    additional = config.additional_config
    noted = additional.get(NAME) if isinstance(additional, dict) else None
    if noted is None:
        return None
    served = Served(Path(noted["memory"]), load_memory_dir(noted["memory"]))
    if served.stored.checksum != noted["checksum"]:
        raise StorageError(f"{served.directory} was saved anew while vLLM started: start it again")
    return served


def _check(config: Any) -> None:
    if not isinstance(config.additional_config, dict):
        raise ConfigError(
            "vLLM's additional_config is an object of another plugin, and a memory has to be noted "
            "there: give it as a JSON object"
        )
    for section, name, wanted, what in _NEEDED:
        part = getattr(config, section, None)
        if part is not None and getattr(part, name, wanted) != wanted:
            raise ConfigError(f"a memory cannot be served by vLLM with {what} yet: leave that out")
    if config.lora_config is not None:
        raise ConfigError(
            "a memory belongs to the base model's weights and cannot be served with --enable-lora"
        )
