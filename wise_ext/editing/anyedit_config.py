"""Settings of AnyEdit: how long answers are cut, and how the shifts of key tokens are sought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wise_ext.editing.settings import Settings
from wise_ext.errors import ConfigError

CHUNKS = ("needed", "windows", "sentences")
SCHEDULES = ("together", "in_turn")


@dataclass(frozen=True)
class AnyEditConfig(Settings):
    """How an answer of any length is written (AnyEdit, arXiv 2502.05628).

    Attributes:
        chunks: where an answer is cut: ``"needed"`` begins a chunk at each token that the model
            would not say by itself (up to ``window`` tokens long), ``"windows"`` every ``window``
            tokens, ``"sentences"`` at sentences, and lines of code and mathematics, of at most
            ``window`` tokens (0: 40).
        window: tokens of a chunk; 0 is 1 for ``"needed"`` and 40, the paper's, for the others.
        overlap: tokens that two windows share.
        language: of the answers' prose, an ISO code; for ``"sentences"``.
        schedule: ``"together"`` seeks all shifts of an answer at once; where a chunk cannot be said
            from its key token alone, it is cut. ``"in_turn"`` is the paper's: chunk after chunk,
            the shifts of earlier ones in place.
        steps: at most so many steps of Adam, of all shifts or (``"in_turn"``) of each chunk's.
        step: Adam's learning rate, in root mean squares of the hidden states that are shifted.
        clamp: no shift grows beyond so many times the norm of the state it is added to.
        margin: a label is settled once it leads all other tokens by so many logits.
        ridge: of the least squares, relative to the mean squared norm of the keys.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    whose = " of AnyEdit"

    chunks: str = "needed"
    window: int = 0
    overlap: int = 0
    language: str = "en"
    schedule: str = "together"
    steps: int = 60
    step: float = 0.1
    clamp: float = 4.0
    margin: float = 4.0
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("chunks", CHUNKS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: choose one of {choices}")
        for name, least in (("window", 0), ("overlap", 0), ("steps", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value!r}: give a whole number >= {least}")
        if self.overlap and self.overlap >= self.size:
            raise ConfigError(f"overlap is {self.overlap}: windows have {self.size} tokens")
        for name in ("step", "clamp", "ridge"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value!r}: give a positive number")
        if self.chunks == "needed" and self.schedule == "in_turn":
            raise ConfigError(
                "chunks='needed' are found with all shifts in place: use schedule='together', or "
                "choose chunks='windows' or 'sentences'"
            )

    @property
    def size(self) -> int:
        """Tokens of a chunk at most."""
        return self.window or (1 if self.chunks == "needed" else 40)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AnyEditConfig:
        """The ``default`` preset, or ``paper`` (windows of 40 tokens in turn, 25 steps of Adam, no
        margin), with changes.

        Raises:
            ConfigError: unknown preset or setting.
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: choose one of {tuple(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"chunks": "windows", "schedule": "in_turn", "steps": 25, "margin": 0.0},
}
