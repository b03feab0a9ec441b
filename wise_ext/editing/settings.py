"""What all settings have in common: they are frozen dataclasses that round-trip as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

from wise_ext.errors import ConfigError


class Settings:
    """Mixed into a dataclass whose fields are plain JSON values."""

    #: Whose settings they are, where a message has to say so.
    whose: ClassVar[str] = ""

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Settings as ``to_dict`` returns them; what is left out takes its default.

        Raises:
            ConfigError: an unknown setting, or a bad value.
        """
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise ConfigError(
                f"unknown setting{cls.whose} {unknown[0]!r}: choose among {', '.join(known)}"
            )
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]
