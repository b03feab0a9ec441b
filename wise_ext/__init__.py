"""Edit what a causal language model knows, and keep the rest as it was.

Names are looked up when first used: ``import wise_ext`` itself is cheap, and imports neither
transformers nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from wise_ext._version import __version__
from wise_ext.errors import (
    ConfigError,
    DataError,
    ModelError,
    NativeError,
    StorageError,
    WiseError,
)

if TYPE_CHECKING:
    from wise_ext.editing.anyedit_config import AnyEditConfig
    from wise_ext.editing.config import WiseConfig
    from wise_ext.editing.editor import Editor
    from wise_ext.editing.edits import Edit, read_edits
    from wise_ext.editing.loading import load_memory
    from wise_ext.models.loading import load_model
    from wise_ext.models.patch import (
        current_memory,
        disabled,
        force_route,
        is_patched,
        last_route,
        memories,
        patch,
        prompt_lengths,
        unload,
        use_memory,
    )

__all__ = [
    "AnyEditConfig",
    "ConfigError",
    "DataError",
    "Edit",
    "Editor",
    "ModelError",
    "NativeError",
    "StorageError",
    "WiseConfig",
    "WiseError",
    "__version__",
    "current_memory",
    "disabled",
    "force_route",
    "is_patched",
    "last_route",
    "load_memory",
    "load_model",
    "memories",
    "patch",
    "prompt_lengths",
    "read_edits",
    "unload",
    "use_memory",
]

# Where each lazy name lives; a test holds it against the block above.
_LAZY = {
    "AnyEditConfig": "wise_ext.editing.anyedit_config",
    "Edit": "wise_ext.editing.edits",
    "Editor": "wise_ext.editing.editor",
    "WiseConfig": "wise_ext.editing.config",
    "current_memory": "wise_ext.models.patch",
    "disabled": "wise_ext.models.patch",
    "force_route": "wise_ext.models.patch",
    "is_patched": "wise_ext.models.patch",
    "last_route": "wise_ext.models.patch",
    "load_memory": "wise_ext.editing.loading",
    "load_model": "wise_ext.models.loading",
    "memories": "wise_ext.models.patch",
    "patch": "wise_ext.models.patch",
    "prompt_lengths": "wise_ext.models.patch",
    "read_edits": "wise_ext.editing.edits",
    "unload": "wise_ext.models.patch",
    "use_memory": "wise_ext.models.patch",
}


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
