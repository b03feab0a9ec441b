"""Settings: presets, round trip, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from wise_ext.editing.config import PRESETS, WiseConfig
from wise_ext.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = WiseConfig.preset(name, seed=3)
    assert WiseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_paper_preset_is_the_papers() -> None:
    c = WiseConfig.preset("paper")
    assert (c.optimizer, c.learning_rate, c.iterations) == ("sgd", 1.0, 70)
    assert (c.mask_ratio, c.shards_per_merge, c.shard_size, c.act_ratio) == (0.2, 2, 500, 0.88)
    assert c.router == "indicator" and c.margins and not c.early_stop


def test_the_indicator_router_brings_its_margins() -> None:
    assert WiseConfig.preset("default", router="indicator").margins


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "vibes"}, "router is 'vibes': choose one of"),
        ({"merge_method": "average"}, "merge_method is 'average': choose one of"),
        ({"shard_size": 0}, "shard_size is 0: give a whole number >= 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5: give a whole number"),
        ({"mask_ratio": 0.0}, r"mask_ratio is 0.0: give a number in \(0, 1\]"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": 0.9}, r"betas is 0.9: give \[a number, a number\]"),
        ({"betas": [0.9]}, r"betas is \(0.9,\): give \[a number, a number\]"),
        ({"cue": "two"}, "cue is 'two': give a number"),
        ({"margins": 1}, "margins is 1: give True or False"),
        ({"seed": True}, "seed is True: give a whole number"),
        ({"alpha": "1"}, "alpha is '1': give a number or None"),
        ({"layer": None}, "layer is None: give a text or a whole number"),
        ({"contexts_per_edit": -1}, "contexts_per_edit is -1: give a whole number >= 0"),
        ({"radius": 0.0}, r"radius is 0.0: give a number in \(0, 1\]"),
        ({"alpha": 1.0}, "give all of alpha, beta and gamma"),
        ({"router": "indicator"}, "needs margins=True"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WiseConfig(**changes)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'fast'"):
        WiseConfig.preset("fast")
    with pytest.raises(ConfigError, match="unknown setting 'lr'"):
        WiseConfig.preset("default", lr=1)
