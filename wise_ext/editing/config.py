"""Settings of an editing run, and the two presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wise_ext.editing.settings import Settings
from wise_ext.errors import ConfigError
from wise_ext.memory.merging import METHODS

SettingsT = TypeVar("SettingsT", bound=Settings)

_CHOICES = {
    "router": ("key", "indicator"),
    "variant": ("retrieve", "merge"),
    "optimizer": ("adam", "sgd"),
    "merge_method": tuple(METHODS),
    "stored": ("exact", "int8"),
}


@dataclass(frozen=True)
class WiseConfig(Settings):
    """How edits are written and found again. The defaults are the ``default`` preset.

    Attributes:
        layer: the down projection to edit: ``"auto"`` (about five sixths of the depth), a block's
            number, or a dotted module path.
        key_layer: the projection whose input is the routing key: ``"auto"`` (the first block's),
            a number or a path, never above ``layer``. Only for ``router="key"``.
        router: ``"key"`` (best stored edit) or ``"indicator"`` (the paper's, Eq. 3-6).
        radius: score, in [0, 1], above which a prompt may belong to a stored edit.
        lead: an edit of a known subject is passed over if a prompt's wording is nearer to another
            relation than to the edit's own by more than this, in (0, 3] (the difference of cosines,
            in which the edit's own counts one and a half times).
            Less keeps more questions about an edited subject in main memory, and loses more
            unusual wordings of the edits; 3 asks for the subject alone.
        cue: strength of the random direction that stands for an edit and enters its memory with
            every token of a prompt that asks for it, in root mean squares of an activation; 0 gives
            none. Only under ``router="key"``, which knows the edit.
        variant: ``"retrieve"`` keeps finished memories apart, ``"merge"`` merges all into one.
        mask_ratio: share of the projection's entries a shard may change [rho].
        shard_size: edits in one shard.
        shards_per_merge: finished shards that are merged into one memory [k]; 1 merges nothing
            under ``"retrieve"``.
        merge_method: see ``wise_ext.memory.merge``; ``merge_density`` is its ``density``.
        batch_size: edits of one call that are trained together; 1 writes one after another.
        optimizer: ``"adam"`` or ``"sgd"``, both on masked entries only.
        learning_rate: per optimiser step; ``betas`` are Adam's.
        iterations: at most this many rounds over a batch of edits.
        rows_per_step: sequences in one optimiser step.
        clamp: no entry of a delta grows beyond this (the reference's norm constraint).
        early_stop: stop once every label is the greedy token by ``stop_margin`` (in logits), and
            still by half of it when all are looked at together, and, where margins are trained,
            their loss is zero. Otherwise run all ``iterations``.
        contexts: model-written prefixes of ``context_tokens`` tokens; each edit draws
            ``contexts_per_edit`` of them (or all) to be practised in, besides its bare prompt.
        shortened: practise an edit in so many shorter wordings, which leave out some words of its
            prompt, other than the subject's, for the first quarter of the rounds.
        reworded: practise an edit in so many wordings of another form, for as long: of its
            relation's, where the edit names its subject and the relation is recognised.
        chat_context: practise an edit inside the chat template, too, where there is one.
        contexts_per_round: of an edit's contexts, so many (or all) are drawn each round.
        replay: rows of the shard's earlier edits practised along with each round. Unless it is 0, a
            step ends only when all of them still pass, and what was forgotten is practised again.
        margins: train Eq. 5's margins on the indicator.
        alpha, beta, gamma: those margins; None scales the paper's 5, 20 and 10 to the model, by
            the size of the edited projection's output on neutral text.
        act_ratio: a shard's threshold is the smallest indicator of its edits times this.
        chat_template: put prompts into the tokenizer's chat template.
        stored: ``"exact"``, or ``"int8"``: the values of shards are rounded to 8 bits and a scale a
            row when they are saved, to a third of the size; what is loaded computes as before.
        seed: of masks, contexts and draws. Same seed, same machine: same bytes.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    layer: str | int = "auto"
    key_layer: str | int = "auto"
    router: str = "key"
    radius: float = 0.68
    lead: float = 0.6
    cue: float = 2.0
    variant: str = "retrieve"
    mask_ratio: float = 0.2
    shard_size: int = 100
    shards_per_merge: int = 1
    merge_method: str = "ties"
    merge_density: float = 1.0
    batch_size: int = 100
    optimizer: str = "adam"
    learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    iterations: int = 160
    rows_per_step: int = 16
    clamp: float = 4.0
    early_stop: bool = True
    stop_margin: float = 2.0
    contexts: int = 10
    contexts_per_edit: int = 2
    shortened: int = 1
    reworded: int = 2
    chat_context: bool = True
    context_tokens: int = 10
    contexts_per_round: int = 1
    replay: int = 4
    margins: bool = False
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    act_ratio: float = 0.88
    chat_template: bool = False
    stored: str = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        betas: Any = self.betas
        if isinstance(betas, list):  # as JSON has them
            object.__setattr__(self, "betas", tuple(betas))
        super().__post_init__()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: choose one of {choices}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value!r}: give a whole number >= {least}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low < value <= high:
                raise ConfigError(f"{name} is {value!r}: give a number in ({low:g}, {high:g}]")
        if not 0 <= self.cue <= 100:
            raise ConfigError(f"cue is {self.cue!r}: give a number in [0, 100]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}: give two numbers in [0, 1)")
        given = [getattr(self, name) is not None for name in ("alpha", "beta", "gamma")]
        if any(given) and not all(given):
            raise ConfigError("give all of alpha, beta and gamma, or none of them")
        if self.router == "indicator" and not self.margins:
            raise ConfigError("router='indicator' needs margins=True: nothing else separates edits")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> WiseConfig:
        """The ``default`` preset, or ``paper`` (WISE, Table 10), with changes.

        Raises:
            ConfigError: unknown preset or setting.
        """
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: choose one of {tuple(PRESETS)}")
        settings = {**PRESETS[name], **changes}
        if changes.get("router") == "indicator":
            settings.setdefault("margins", True)
        return cls.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return {**super().to_dict(), "betas": list(self.betas)}

    def replace(self, **changes: Any) -> WiseConfig:
        """A changed copy."""
        return replace(self, **changes)


def settled(given: SettingsT | None, stored: SettingsT, directory: Path) -> SettingsT:
    """The settings of a memory that is edited on; they cannot change on the way.

    Raises:
        ConfigError: other ones were given.
    """
    if given is None or given == stored:
        return stored
    old, new = stored.to_dict(), given.to_dict()
    name = next(key for key in old if old[key] != new[key])
    raise ConfigError(
        f"the memory in {directory} was made with {name}={old[name]!r}, not {new[name]!r}: "
        "edit on with its own settings, or choose another directory"
    )


_LEAST = {
    "shard_size": 1,
    "shards_per_merge": 1,
    "batch_size": 1,
    "iterations": 1,
    "rows_per_step": 1,
    "contexts": 0,
    "contexts_per_edit": 0,
    "shortened": 0,
    "reworded": 0,
    "context_tokens": 1,
    "contexts_per_round": 0,
    "replay": 0,
    "seed": 0,
}
_RANGES = {
    "mask_ratio": (0.0, 1.0),
    "merge_density": (0.0, 1.0),
    "radius": (0.0, 1.0),
    "lead": (0.0, 3.0),
    "learning_rate": (0.0, math.inf),
    "clamp": (0.0, 1e30),
    "act_ratio": (0.0, 1.0),
    "stop_margin": (-math.inf, math.inf),
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Table 10 and appendix A.3; the trim density is the reference implementation's.
    "paper": {
        "router": "indicator",
        "cue": 0.0,
        "margins": True,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "iterations": 70,
        "early_stop": False,
        "batch_size": 1,
        "shard_size": 500,
        "shards_per_merge": 2,
        "merge_density": 0.53,
        "clamp": 1.0,
        "contexts": 10,
        "contexts_per_edit": 10,
        "shortened": 0,
        "reworded": 0,
        "chat_context": False,
        "contexts_per_round": 10,
        "rows_per_step": 32,
        "replay": 0,
    },
}
