"""Optional packages: asked for before any work begins."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import ConfigError


def require(package: str, extra: str, purpose: str) -> None:
    """Complain where an optional package is missing.

    Args:
        package: the module that would be imported.
        extra: the extra of wise-ext that installs it.
        purpose: what needs it, for the message.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(f'{purpose} needs {package}: pip install "wise-ext[{extra}]"')
