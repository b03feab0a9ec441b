"""Real tokens from masks of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from wise_ext.errors import ModelError
from wise_ext.models.real_tokens import first_tokens, real_tokens

CPU = torch.device("cpu")
# Left pads, right pads, none.
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


def causal(real: Tensor, window: int = 99) -> Tensor:
    tokens = real.shape[1]
    ages = torch.arange(tokens).unsqueeze(1) - torch.arange(tokens)
    return (((ages >= 0) & (ages < window)) & real.unsqueeze(1)).unsqueeze(1)


def additive(mask: Tensor, lowest: float) -> Tensor:
    return torch.where(mask, 0.0, lowest)


def block(real: Tensor) -> Any:
    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & real[b, kv]

    return create_block_mask(visible, real.shape[0], None, 5, 5, device="cpu", BLOCK_SIZE=128)


FORMS: dict[str, Callable[[], Any]] = {
    "2d": lambda: REAL.long(),
    "2d bool": lambda: REAL,
    "4d bool": lambda: causal(REAL),
    "4d fp32": lambda: additive(causal(REAL), torch.finfo(torch.float32).min),
    "4d fp16": lambda: additive(causal(REAL), torch.finfo(torch.float16).min).half(),
    "4d inf": lambda: additive(causal(REAL), -torch.inf),
    "4d longer": lambda: torch.cat([causal(REAL), torch.zeros(3, 1, 5, 4).bool()], -1),
    "dict": lambda: {"sliding_attention": causal(REAL, 2), "full_attention": causal(REAL)},
    "window only": lambda: {"full_attention": None, "sliding_attention": causal(REAL, 2)},
    "block mask": lambda: block(REAL),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_marks_the_same_tokens(form: str) -> None:
    assert torch.equal(real_tokens(FORMS[form](), 3, 5, CPU), REAL)


@pytest.mark.parametrize("mask", [None, {}, {"full_attention": None}])
def test_no_mask_means_all_real(mask: Any) -> None:
    assert real_tokens(mask, 3, 5, CPU).all()


def test_a_mask_shared_by_all_rows() -> None:
    assert torch.equal(real_tokens(causal(REAL[:1]), 3, 5, CPU), REAL[:1].expand(3, 5))


@pytest.mark.parametrize("past", [2, 7, torch.tensor(2), torch.tensor(7)])
def test_tokens_behind_a_filled_cache(past: int | Tensor) -> None:
    # With a past of 7 tokens the mask is that of a window which has forgotten some of them.
    assert torch.equal(real_tokens(REAL, 3, 3, CPU, past), REAL[:, 2:])
    rows = causal(REAL)[:, :, 2:]
    assert torch.equal(real_tokens(rows, 3, 3, CPU, past), REAL[:, 2:])


def test_other_forms_are_refused() -> None:
    with pytest.raises(ModelError, match=r"mask of \(3, 5, 5\): pass"):
        real_tokens(torch.zeros(3, 5, 5), 3, 5, CPU)
    with pytest.raises(ModelError, match="mask of str"):
        real_tokens("all", 3, 5, CPU)


def test_first_tokens_skips_pads() -> None:
    kept = first_tokens(REAL, torch.tensor([2, 1, 9]))
    assert kept.int().tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
