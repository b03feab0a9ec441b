"""Which module to replace in which architecture, loading models, patching and unpatching them."""

from wise_ext.models.loading import fingerprint, load_model
from wise_ext.models.patch import current_memory, is_patched, memories, patch, unload
from wise_ext.models.scopes import (
    decide_routes,
    disabled,
    force_route,
    last_decision,
    last_route,
    prompt_lengths,
    use_memory,
)
from wise_ext.models.table import (
    ARCHITECTURES,
    Architecture,
    find_architecture,
    get_module,
    layer_path,
    projection_shape,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "current_memory",
    "decide_routes",
    "disabled",
    "find_architecture",
    "fingerprint",
    "force_route",
    "get_module",
    "is_patched",
    "last_decision",
    "last_route",
    "layer_path",
    "load_model",
    "memories",
    "patch",
    "projection_shape",
    "prompt_lengths",
    "unload",
    "use_memory",
]
