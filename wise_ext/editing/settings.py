"""What all settings have in common: they are frozen dataclasses that round-trip as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from types import NoneType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from wise_ext.errors import ConfigError

_KINDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "None",
}


class Settings:
    """Mixed into a dataclass whose fields are plain JSON values.

    Raises:
        ConfigError: a value is not what its field is annotated as.
    """

    #: Whose settings they are, where a message has to say so.
    whose: ClassVar[str] = ""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for name in (f.name for f in fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if not _is(value, kinds[name]):
                raise ConfigError(f"{name} is {value!r}: give {_called(kinds[name])}")

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


def read_settings(given: Iterable[str]) -> dict[str, Any]:
    """Settings that were written down, each as ``NAME=VALUE``; the last one of a name counts.

    A value is JSON, or, where it is none, a text as it stands.

    Raises:
        ConfigError: one is something else.
    """
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"--set {text}: write NAME=VALUE, for example mask_ratio=0.1")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def apart(
    settings: Mapping[str, Any], group: str, method: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the editor, and a method's own among them: their names begin with ``group.``.

    Raises:
        ConfigError: there are such, and the method in use is another.
    """
    own = {name: value for name, value in settings.items() if name.startswith(f"{group}.")}
    if own and method != group:
        raise ConfigError(f"{next(iter(own))} is a setting of {group}, not of {method}")
    rest = {name: value for name, value in settings.items() if name not in own}
    return rest, {name.removeprefix(f"{group}."): value for name, value in own.items()}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a whole number is a number, and True is none."""
    kinds = get_args(kind)
    if get_origin(kind) is tuple:
        right = isinstance(value, tuple) and len(value) == len(kinds)
        return right and all(_is(part, k) for part, k in zip(value, kinds, strict=True))
    if kinds:
        return any(_is(value, k) for k in kinds)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _called(kind: Any) -> str:
    kinds = get_args(kind)
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_called, kinds))}]"
    return " or ".join(_KINDS[k] for k in kinds or (kind,))
