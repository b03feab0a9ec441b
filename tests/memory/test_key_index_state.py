"""What the key index stores, refuses, and makes of other widths and dtypes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.memory import made_texts as made
from wise_ext.errors import ConfigError
from wise_ext.memory import KeyIndex, TokenKeys
from wise_ext.memory.token_keys import random_signs, standardise

Draw = Callable[..., Tensor]


def test_projection_shortens_keys_and_keeps_their_neighbours(draw: Draw) -> None:
    ids = torch.arange(40)
    prompts = [TokenKeys(ids[i : i + 1], draw(1, 400, seed=i)) for i in range(40)]
    near = [TokenKeys(p.ids, p.activation + 0.2 * draw(1, 400, seed=99)) for p in prompts]
    index = made.filled(prompts, width=128, seed=3, background=())
    assert index.keys.shape == (40, 128) and index.width == 128
    assert index.nearest(near)[1].tolist() == list(range(40))
    assert made.filled(prompts, width=128, seed=3, background=()).keys.equal(index.keys)
    assert not made.filled(prompts, width=128, seed=4, background=()).keys.equal(index.keys)
    signs = random_signs(400, 128, 3)
    assert signs.abs().sub(128**-0.5).abs().max() < 1e-6
    assert abs(float(signs.sign().mean())) < 0.02
    assert random_signs(40, 40, 0).shape == (40, 0)


def test_standardising(draw: Draw) -> None:
    x = draw(50, 4) * torch.tensor([1.0, 20.0, 1e-9, 0.0]) + torch.tensor([5.0, 0.0, 3.0, 1.0])
    mean, scale = standardise(x)
    done = (x - mean) * scale
    torch.testing.assert_close(done[:, :2].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(done.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    # What hardly varies is not blown up.
    assert done[:, 2:].abs().max() < 1e-2
    for too_few in (x[:0], x[:1]):
        mean, scale = standardise(too_few)
        assert mean.equal(torch.zeros(4)) and scale.equal(torch.ones(4))
    mean, scale = standardise(x[:1].repeat(3, 1))
    torch.testing.assert_close(mean, x[0])
    assert scale.equal(torch.ones(4))


@pytest.mark.parametrize("width", [512, 7])
def test_state_round_trip(width: int) -> None:
    index = made.filled(made.PROMPTS, width=width, seed=5)
    meta = json.loads(json.dumps(index.state_meta()))
    again = KeyIndex.from_state({n: t.clone() for n, t in index.state_tensors().items()}, meta)
    assert again.state_meta() == index.state_meta()
    for name, tensor in index.state_tensors().items():
        assert again.state_tensors()[name].equal(tensor)
    wanted, got = index.nearest(made.QUERIES), again.nearest(made.QUERIES)
    assert got[0].equal(wanted[0]) and got[1].equal(wanted[1])
    # It goes on as the first would.
    for each in (index, again):
        each.add(made.PROMPTS[:1], [9], ["more"])
    assert again.keys.equal(index.keys) and again.nearest(made.QUERIES)[0].equal(
        index.nearest(made.QUERIES)[0]
    )


def test_an_empty_index_makes_the_round_trip() -> None:
    index = KeyIndex(made.DIM)
    again = KeyIndex.from_state(index.state_tensors(), index.state_meta())
    assert len(again) == 0 and again.state_meta() == index.state_meta()


def test_state_that_does_not_fit() -> None:
    index = made.filled(made.PROMPTS[:3])
    tensors, meta = index.state_tensors(), index.state_meta()

    def refused(match: str, meta_changes: dict[str, object] | None = None, **changes: Tensor):
        with pytest.raises(ValueError, match=match):
            KeyIndex.from_state(tensors | changes, meta | (meta_changes or {}))

    int32 = torch.int32
    refused(r"keys must be torch.int8 \[12, 192\]", keys=tensors["keys"][:, 1:])
    refused(r"keys must be torch.int8 \[12, 192\]", keys=tensors["keys"].float())
    refused("keys must be", keys=torch.tensor(3, dtype=torch.int8))
    refused(r"mean must be torch.float32 \[96\]", mean=tensors["mean"][1:])
    refused(r"scale must be torch.float32 \[96\]", scale=tensors["scale"].double())
    refused(r"common must be torch.int64 \[\d+, 2\]", common=tensors["common"][:, :1])
    refused("common must be", common=torch.tensor(3))
    refused(r"tokens must be torch.int32 \[12\]", tokens=tensors["tokens"][1:])
    refused(r"lengths must be torch.int32 \[3\]", lengths=tensors["lengths"][1:])
    refused(r"shards must be torch.int32 \[3\]", shards=tensors["shards"].long())
    refused(r"lengths must be torch.int32 \[2\]", {"ids": ["a", "b"]})
    refused("do not add up to 12 keys", lengths=torch.tensor([5, 6, 2], dtype=int32))
    refused("do not add up to 12 keys", lengths=torch.tensor([6, 6, 0], dtype=int32))
    refused("do not add up to 12 keys", lengths=torch.tensor([13, -2, 1], dtype=int32))
    # More than an edit keeps.
    refused(
        "do not add up to 19 keys",
        keys=torch.zeros(19, 2 * made.DIM, dtype=torch.int8),
        named=torch.zeros(19, dtype=torch.bool),
        tokens=torch.zeros(19, dtype=int32),
        lengths=torch.tensor([17, 1, 1], dtype=int32),
    )
    refused("a token is common to none or more", common=torch.tensor([[3, -1]]))
    refused("a token is common to none or more", {"texts": 2})
    with pytest.raises(KeyError, match="tokens"):
        KeyIndex.from_state({n: t for n, t in tensors.items() if n != "tokens"}, meta)


def test_bad_arguments() -> None:
    index = KeyIndex(made.DIM)
    short = TokenKeys(torch.tensor([3]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"must be \[1, 96\], got \[1, 4\]"):
        index.add([short], [0], ["a"])
    with pytest.raises(ValueError, match=r"must be \[2, 96\], got \[1, 96\]"):
        index.add([TokenKeys(torch.tensor([3, 4]), torch.zeros(1, made.DIM))], [0], ["a"])
    with pytest.raises(ValueError, match="2 keys, 1 shards and 2 ids"):
        index.add(made.PROMPTS[:2], [0], ["a", "b"])
    with pytest.raises(ValueError, match="shard >= 0"):
        index.add(made.PROMPTS[:1], [-1], ["a"])
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not finite"):
            index.add([TokenKeys(torch.tensor([3]), torch.full((1, made.DIM), bad))], [0], ["a"])
    with pytest.raises(ValueError, match="without tokens"):
        index.add([made.PROMPTS[0], made.text([])], [0, 0], ["a", "b"])
    # Nothing half-added.
    assert len(index) == 0 and len(index.keys) == 0
    with pytest.raises(ValueError, match="empty"):
        index.nearest(made.QUERIES[:1])
    with pytest.raises(ValueError, match=r"must be \[1, 96\]"):
        KeyIndex(made.DIM, background=[short])
    with pytest.raises(ConfigError, match="key width is 0"):
        KeyIndex(made.DIM, width=0)


def test_a_key_of_zeros_is_like_nothing() -> None:
    index = made.filled([TokenKeys(torch.tensor([3]), torch.zeros(1, made.DIM))], background=())
    score, row = index.nearest([made.QUERIES[0]])
    assert (score.item(), row.item()) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_stored_in_fp32(dtype: torch.dtype) -> None:
    halves = [TokenKeys(p.ids, p.activation.to(dtype)) for p in made.PROMPTS]
    floats = [TokenKeys(p.ids, p.activation.float()) for p in halves]
    assert made.filled(halves).keys.equal(made.filled(floats).keys)
