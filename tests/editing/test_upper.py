"""The model above a projection, in pieces, against the whole model."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from wise_ext.editing.rows import Row
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.upper import Prefix, Stretch, UpperModel
from wise_ext.models import get_module, layer_path

LENGTHS = (3, 13, 8)


def cut(lab: SimpleNamespace, name: str, block: int = 1, **more: Any) -> tuple[Any, SuffixEngine]:
    model = lab.make_model(name, **more)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, SuffixEngine(model, layer_path(model, block))


def sequences(lab: SimpleNamespace) -> list[list[int]]:
    return lab.prompts(*LENGTHS)


def captured(engine: SuffixEngine, texts: list[list[int]]) -> list[Row]:
    """Rows of all tokens of some texts."""
    return engine.capture([text[:1] for text in texts], [[*text[1:], 1] for text in texts])


def stretch(rows: list[Row], begins: list[int], ends: list[int]) -> Stretch:
    parts = [row.base[a:b] for row, a, b in zip(rows, begins, ends, strict=True)]
    return Stretch.of(rows, begins, parts)


def in_pieces(upper: UpperModel, rows: list[Row], cuts: list[list[int]]) -> list[Tensor]:
    """Logits of rows that are run from one of their cuts to the next."""
    prefix = Prefix.empty(len(rows), rows[0].base.device)
    found: list[list[Tensor]] = [[] for _ in rows]
    for begins, ends in pairwise(cuts):
        part = stretch(rows, begins, ends)
        logits = upper.logits(part, prefix)
        prefix = upper.extended(prefix, part)
        for i, one in enumerate(logits):
            found[i].append(one[part.real[i]])
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_pieces_are_the_model(lab: SimpleNamespace, architecture: str, block: int) -> None:
    """Prefixes of different lengths (none, too), rows of different widths and without a token."""
    model, engine = cut(lab, architecture, block)
    texts = sequences(lab)
    rows = captured(engine, texts)
    cuts = [[0, 0, 0], [0, 4, 2], [1, 11, 3], [1, 12, 3], [3, 13, 8]]
    found = in_pieces(UpperModel(engine), rows, cuts)
    for text, logits in zip(texts, found, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([text]), use_cache=False).logits[0]
        assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_nothing_is_left_in_the_model(lab: SimpleNamespace, architecture: str) -> None:
    model, engine = cut(lab, architecture)
    (text,) = lab.prompts(6)
    before = model(torch.tensor([text]), use_cache=False).logits
    rows = captured(engine, [text])
    upper = UpperModel(engine)
    with pytest.raises(RuntimeError):
        upper.logits(stretch(rows, [0], [6])._replace(positions=torch.zeros(2, 9)), prefix_of(1))
    assert torch.equal(model(torch.tensor([text]), use_cache=False).logits, before)
    assert not any("forward" in vars(block) for block in engine.blocks)


def test_a_forward_that_somebody_put_there_stays(lab: SimpleNamespace) -> None:
    _, engine = cut(lab, "llama")
    mine = engine.blocks[0].forward
    engine.blocks[0].forward = mine
    rows = captured(engine, lab.prompts(4))
    UpperModel(engine).logits(stretch(rows, [0], [4]), prefix_of(1))
    assert vars(engine.blocks[0])["forward"] is mine


def prefix_of(rows: int) -> Prefix:
    return Prefix.empty(rows, torch.device("cpu"))


def test_rows_leave_the_prefix(lab: SimpleNamespace, architecture: str) -> None:
    _, engine = cut(lab, architecture)
    rows = captured(engine, sequences(lab))
    upper = UpperModel(engine)
    prefix = upper.extended(prefix_of(3), stretch(rows, [0, 0, 0], [2, 10, 5]))
    kept = prefix.keep([2, 0])
    assert len(prefix) == 10
    assert len(kept) == 5
    assert kept.real.sum(1).tolist() == [5, 2]
    two = [rows[2], rows[0]]
    logits = upper.logits(stretch(two, [5, 2], [8, 3]), kept)
    for i, (row, begin, end) in enumerate(((rows[2], 5, 8), (rows[0], 2, 3))):
        alone = upper.extended(prefix_of(1), stretch([row], [0], [begin]))
        wanted = upper.logits(stretch([row], [begin], [end]), alone)[0]
        assert_close(logits[i, : end - begin], wanted, rtol=1e-3, atol=1e-3)


def test_what_is_put_in_place_is_seen_by_what_follows(
    lab: SimpleNamespace, architecture: str
) -> None:
    """A projection whose output is moved at one token, against a hook in the whole model."""
    model, engine = cut(lab, architecture)
    (text,) = lab.prompts(9)
    (row,) = captured(engine, [text])
    shift = torch.randn(row.base.shape[-1]) * row.base.norm(dim=-1).median() / 8
    moved = row.base.clone()
    moved[4] += shift
    upper = UpperModel(engine)
    prefix = upper.extended(prefix_of(1), Stretch.of([row], [0], [moved[:6]]))
    logits = upper.logits(Stretch.of([row], [6], [moved[6:]]), prefix)[0]

    def move(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(9, -1)[4] += shift
        return output

    hook = get_module(model, layer_path(model, 1)).register_forward_hook(move)
    wanted = model(torch.tensor([text]), use_cache=False).logits[0]
    hook.remove()
    unmoved = model(torch.tensor([text]), use_cache=False).logits[0]
    assert_close(logits, wanted[6:], rtol=1e-3, atol=2e-3)
    assert (wanted - unmoved)[6:].abs().max() > 0.05
