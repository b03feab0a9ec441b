"""``--set``: settings that have no option of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def settings_of(given: Sequence[str] | None, form: str) -> dict[str, Any]:
    """Names and values, as they were given; the last one of a name counts.

    Args:
        given: ``NAME=JSON``, each.
        form: what to write, with an example.

    Raises:
        ConfigError: one is something else.
    """
    from ..errors import ConfigError

    settings: dict[str, Any] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ConfigError(f"--set {text}: write {form}") from None
    return settings
