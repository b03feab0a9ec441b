"""Rows that leave the batch early change nothing: the answers are ``generate``'s own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wise_ext.evaluation import decoding
from wise_ext.evaluation.decoding import Taken, decode_greedily
from wise_ext.models import disabled, force_route, last_route, patch

# So many that random models stop early, and each row at another step.
STOPS = frozenset(range(1, 61, 7))
STEPS = 9


def alone(model: Any, row: list[int]) -> tuple[list[int], int]:
    """The model's own generate on one prompt: its tokens to the stop, and the route it took."""
    written = model.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        do_sample=False,
        max_new_tokens=STEPS,
        eos_token_id=sorted(STOPS),
    )[0, len(row) :].tolist()
    route = last_route(model)
    assert route is not None
    return written, int(route)


def test_answers_are_those_of_generate(lab: Any, architecture: str) -> None:
    model = lab.make_model(architecture)
    rows = lab.prompts(4, 7, 9, 5, 3, 8, 6, 6, seed=3)
    patch(model, lab.key_memory(model, rows[:3]))
    expected = [alone(model, row) for row in rows]
    assert {route for _, route in expected} >= {-1, 0, 1, 2}
    assert len({len(tokens) for tokens, _ in expected}) > 2
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = lab.padded(rows)
    found = decode_greedily(model, batch["input_ids"], batch["attention_mask"], STOPS, STEPS)
    handle.remove()
    assert [(tokens, taken.route) for tokens, taken in found] == expected
    assert widths[0] == len(rows) and widths == sorted(widths, reverse=True)
    assert widths[-1] < len(rows)


def test_forced_routes(lab: Any) -> None:
    model = lab.make_model("llama")
    rows = lab.prompts(4, 7, 5, seed=3)
    patch(model, lab.key_memory(model, rows[:2]))
    batch = lab.padded(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = [Taken(1, 7), Taken(-1, 0), Taken(0, 0)]
    found = decode_greedily(model, ids, mask, STOPS, STEPS, routes=wanted)
    assert [written.taken for written in found] == wanted
    for row, taken, written in zip(rows, wanted, found, strict=True):
        with force_route(model, taken.route, [taken.cue]):
            assert (written.tokens, taken.route) == alone(model, row)
    with disabled(model):
        plain = decode_greedily(model, ids, mask, STOPS, STEPS)
    assert [written.taken.route for written in plain] == [-1, -1, -1]
    assert plain[1].tokens == found[1].tokens


def test_a_cache_that_cannot_be_cut(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate`` takes over, set up by the caller."""
    model = lab.make_model("llama")
    rows = lab.prompts(4, 7, 5, seed=3)
    patch(model, lab.key_memory(model, rows[:2]))
    expected = [alone(model, row) for row in rows]
    batch = lab.padded(rows)
    model.generation_config.update(
        do_sample=False, max_new_tokens=STEPS, eos_token_id=sorted(STOPS)
    )
    monkeypatch.setattr(decoding, "_CUT", "no_such_method")
    found = decode_greedily(model, batch["input_ids"], batch["attention_mask"], STOPS, STEPS)
    assert [(tokens, taken.route) for tokens, taken in found] == expected
