"""Shifts of key tokens, against the whole model with a hook at the edited projection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from tests.editing.facts import A2, A3, EDITS
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.chunks import Chunk, windows
from wise_ext.editing.in_turn import Answer, chunk_losses, seek_in_turn
from wise_ext.editing.passages import PassageWriter
from wise_ext.editing.rows import Row
from wise_ext.editing.shifts import Shifts, clamp_, label_leads, scales, seek_together, slopes
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.upper import Prefix, Stretch, UpperModel
from wise_ext.models import get_module, layer_path

# Random models are hard to talk into anything.
EAGER = {"steps": 300, "clamp": 50.0, "margin": 0.5}


def cut(lab: SimpleNamespace, name: str, double: bool = False) -> tuple[Any, SuffixEngine]:
    model = lab.make_model(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = SuffixEngine(model, layer_path(model, 1))
    if double:
        # An engine looks at its model in precisions that side memories have.
        model.double()
        engine._calls.clear()
    return model, engine


def texts(lab: SimpleNamespace) -> tuple[list[list[int]], list[list[int]]]:
    return lab.prompts(5, 1, 9), lab.prompts(7, 4, 6, seed=1)


def sayable(lab: SimpleNamespace, model: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The same prompts, and answers that a norm behind the projection does not put out of reach:
    each token is the model's second choice."""
    prompts, targets = texts(lab)
    return prompts, [own_answer(model, p, len(t), 2) for p, t in zip(prompts, targets, strict=True)]


def own_answer(model: Any, prompt: list[int], length: int, choice: int = 1) -> list[int]:
    text = list(prompt)
    for _ in range(length):
        text.append(int(whole(model, text)[-1].topk(choice).indices[-1]))
    return text[len(prompt) :]


def in_turn(**more: Any) -> AnyEditConfig:
    return AnyEditConfig(chunks="windows", schedule="in_turn", **({"window": 2} | EAGER | more))


@contextmanager
def moved(model: Any, places: Sequence[int], values: Sequence[Tensor]) -> Iterator[None]:
    """The projection's output is shifted at some tokens of the single row that is run."""

    def move(module: Any, args: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])
        for place, value in zip(places, values, strict=True):
            at = torch.tensor([place])
            flat = flat.index_add(0, at, value[None].to(flat.dtype))
        return flat.view_as(output)

    hook = get_module(model, layer_path(model, 1)).register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def whole(model: Any, text: list[int], shifts: Shifts | None = None) -> Tensor:
    places, values = (shifts.places.tolist(), list(shifts.values)) if shifts else ([], [])
    with moved(model, places, values):
        return model(torch.tensor([text]), use_cache=False).logits[0]


def chunks_of(rows: list[Row], config: AnyEditConfig) -> list[list[Chunk]]:
    return [windows(len(row.labels), config.size, config.overlap) for row in rows]


def says(model: Any, prompt: list[int], target: list[int], shifts: Shifts) -> bool:
    logits = whole(model, prompt + target[:-1], shifts)[len(prompt) - 1 :]
    return logits.argmax(-1).tolist() == target


@pytest.mark.parametrize("chunks", ["needed", "windows", "in pairs"])
def test_together_the_answer_is_said(lab: SimpleNamespace, architecture: str, chunks: str) -> None:
    model, engine = cut(lab, architecture)
    window = {"needed": 0, "windows": 3, "in pairs": 2}[chunks]
    config = AnyEditConfig(chunks=chunks if window != 2 else "needed", window=window, **EAGER)
    for prompt, target in zip(*sayable(lab, model), strict=True):
        (row,) = engine.capture([prompt], [target])
        given = [] if config.chunks == "needed" else windows(len(target), 3)
        shifts = seek_together(engine, row, given, config)
        assert says(model, prompt, target, shifts)
        ahead = label_leads(
            engine, row, row.base.index_add(0, shifts.places, shifts.values.to(row.base))
        )
        assert ahead.min() >= config.margin - 1e-3
        assert {len(prompt) - 1 + c.begin for c in given} <= set(shifts.places.tolist())
        losses = F.cross_entropy(
            whole(model, prompt + target[:-1], shifts)[len(prompt) - 1 :], torch.tensor(target)
        )
        assert shifts.loss == pytest.approx(float(losses), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("window", "overlap"), [(1, 0), (3, 1)])
def test_in_turn_the_answer_is_said(
    lab: SimpleNamespace, architecture: str, window: int, overlap: int
) -> None:
    """One pass with all shifts in place says what was said on the way."""
    model, engine = cut(lab, architecture)
    prompts, targets = sayable(lab, model)
    config = in_turn(window=window, overlap=overlap, steps=100 if window == 1 else 10)
    rows = engine.capture(prompts, targets)
    chunks = chunks_of(rows, config)
    found = seek_in_turn(UpperModel(engine), rows, chunks, config)
    for prompt, target, shifts, of in zip(prompts, targets, found, chunks, strict=True):
        assert shifts.places.tolist() == [len(prompt) - 1 + c.begin for c in of]
        logits = whole(model, prompt + target[:-1], shifts)[len(prompt) - 1 :]
        loss = F.cross_entropy(logits, torch.tensor(target))
        assert shifts.loss == pytest.approx(float(loss), rel=1e-2, abs=1e-3)
        assert window > 1 or says(model, prompt, target, shifts)


def brute_force(
    model: Any, row: Row, text: list[int], chunks: list[Chunk], config: AnyEditConfig
) -> Shifts:
    """Chunk after chunk with the whole model run each time, nothing cached."""
    first, rounds = row.prompt_length - 1, 0
    norms, unit = scales(row)
    places: list[int] = []
    values: list[Tensor] = []
    for begin, end in chunks:
        shift = torch.zeros(row.base.shape[-1], requires_grad=True)
        adam = torch.optim.Adam([shift], lr=config.step, betas=(0.9, 0.99))
        for _ in range(config.steps):
            with moved(model, [*places, first + begin], [*values, shift * unit]):
                logits = model(torch.tensor([text[: first + end]]), use_cache=False).logits[0]
            logits, labels = logits[first + begin :], row.labels[begin:end]
            own = logits.gather(1, labels[:, None])
            rivals = logits.scatter(1, labels[:, None], -torch.inf)
            failing = (own[:, 0] - rivals.max(1).values) < config.margin
            if not failing.any():
                break
            losses = F.cross_entropy(logits, labels, reduction="none")
            adam.zero_grad()
            (losses * torch.where(failing, 1.0, 0.1)).sum().backward()
            adam.step()
            rounds += 1
            with torch.no_grad():
                longest = config.clamp * float(norms[begin])
                shift *= min(1.0, longest / float((shift * unit).norm()))
        places.append(first + begin)
        values.append((shift * unit).detach())
    return Shifts(torch.tensor(places), torch.stack(values), rounds, 0.0)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj", "opt"])
def test_in_turn_is_brute_force(lab: SimpleNamespace, name: str, overlap: int) -> None:
    model, engine = cut(lab, name, double=True)
    prompts, targets = texts(lab)
    config = in_turn(steps=12, clamp=2.0, window=3, overlap=overlap)
    rows = engine.capture(prompts, targets)
    found = seek_in_turn(UpperModel(engine), rows, chunks_of(rows, config), config)
    for prompt, target, row, shifts in zip(prompts, targets, rows, found, strict=True):
        chunks = windows(len(target), 3, overlap)
        wanted = brute_force(model, row, prompt + target[:-1], chunks, config)
        assert shifts.places.tolist() == wanted.places.tolist()
        assert shifts.rounds == wanted.rounds
        scale = float(wanted.values.abs().max())
        assert_close(shifts.values, wanted.values, rtol=1e-3, atol=1e-3 * scale)


def test_company_makes_no_difference(lab: SimpleNamespace, architecture: str) -> None:
    _, engine = cut(lab, architecture, double=True)
    prompts, targets = texts(lab)
    config = in_turn(steps=10, window=3)
    rows = engine.capture(prompts, targets)
    upper, chunks = UpperModel(engine), chunks_of(rows, config)
    together = seek_in_turn(upper, rows, chunks, config)
    for row, of, shifts in zip(rows, chunks, together, strict=True):
        (alone,) = seek_in_turn(upper, [row], [of], config)
        assert alone.rounds == shifts.rounds
        assert_close(alone.values, shifts.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_together(lab: SimpleNamespace, name: str) -> None:
    """Of the loss in the shifts, against finite differences of the whole model in float64."""
    model, engine = cut(lab, name, double=True)
    (prompt, *_), (target, *_) = texts(lab)
    (row,) = engine.capture([prompt], [target])
    keys = torch.arange(len(target)) + len(prompt) - 1
    d = row.base.shape[-1]
    shifts = (0.1 * torch.randn(len(target), d, dtype=torch.float64)).requires_grad_()
    hidden, _, labels = engine.above([row], row.base.index_add(0, keys, shifts))
    margin = 1.0
    gradients, ahead, _ = slopes(engine, hidden, labels, margin)
    (gradient,) = torch.autograd.grad(hidden, shifts, gradients)
    weights = torch.where(ahead < margin, 1.0, 0.1)

    def loss(values: Tensor) -> float:
        at = Shifts(keys, values, 0, 0.0)
        logits = whole(model, prompt + target[:-1], at)[len(prompt) - 1 :]
        losses = F.cross_entropy(logits, torch.tensor(target), reduction="none")
        return float((losses * weights).sum())

    check_slope(loss, shifts.detach(), gradient, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])
def test_gradient_in_turn(lab: SimpleNamespace, name: str) -> None:
    model, engine = cut(lab, name, double=True)
    (prompt, *_), (target, *_) = texts(lab)
    (row,) = engine.capture([prompt], [target])
    answer = Answer(row, [Chunk(0, len(target))])
    upper = UpperModel(engine)
    before = Stretch.of([row], [0], [row.base[: answer.key]])
    prefix = upper.extended(Prefix.empty(1, row.base.device), before)
    shift = (0.1 * torch.randn(row.base.shape[-1], dtype=torch.float64)).requires_grad_()
    (losses,), (ahead,) = chunk_losses(upper, [answer], [shift], prefix)
    (gradient,) = torch.autograd.grad(losses.sum(), shift)

    def at(value: Tensor) -> Tensor:
        shifts = Shifts(torch.tensor([answer.key]), (value * answer.unit)[None], 0, 0.0)
        return whole(model, prompt + target[:-1], shifts)[len(prompt) - 1 :]

    def loss(value: Tensor) -> float:
        return float(F.cross_entropy(at(value), torch.tensor(target), reduction="sum"))

    check_slope(loss, shift.detach(), gradient, rtol=1e-3)
    logits, labels = at(shift.detach()), torch.tensor(target)
    own = logits[torch.arange(len(target)), labels]
    logits[torch.arange(len(target)), labels] = -torch.inf
    assert_close(ahead, own - logits.max(1).values)


def check_slope(loss: Any, at: Tensor, gradient: Tensor, rtol: float) -> None:
    """Along some directions, the gradient's own among them."""
    directions = [gradient / gradient.norm(), *torch.randn(3, *at.shape, dtype=at.dtype)]
    for direction in directions:
        # Of fourth order: norms and attention are in fp32 even so, which forbids tiny steps.
        one, two = (loss(at + h * direction) - loss(at - h * direction) for h in (0.01, 0.02))
        slope = (8 * one - two) / 0.12
        wanted = float((gradient * direction).sum())
        assert slope == pytest.approx(wanted, rel=rtol, abs=rtol * float(gradient.norm()))


def test_what_the_model_says_anyway_is_not_moved(lab: SimpleNamespace) -> None:
    """Nor does it go on changing while others are at work."""
    model, engine = cut(lab, "llama")
    prompts, targets = texts(lab)
    targets[0] = own_answer(model, prompts[0], 7)
    config = in_turn(margin=0.0)
    rows = engine.capture(prompts, targets)
    easy, hard, _ = seek_in_turn(UpperModel(engine), rows, chunks_of(rows, config), config)
    assert easy.rounds == 0
    assert not easy.values.any()
    assert hard.rounds > 0
    assert hard.values.abs().amax(1).max() > 0
    together = seek_together(engine, rows[0], [], AnyEditConfig(margin=0.0))
    assert together.rounds == 0
    assert not len(together.places)


def test_a_settled_row_keeps_its_shift(lab: SimpleNamespace) -> None:
    """The quickest of a batch: what stopped it is what it has, in rounds and to the bit."""
    _, engine = cut(lab, "llama")
    prompts, targets = texts(lab)
    rows = engine.capture(prompts, targets)
    upper = UpperModel(engine)
    config = in_turn(margin=0.0, window=1)
    first = [[Chunk(0, 1)] for _ in rows]
    rounds = [s.rounds for s in seek_in_turn(upper, rows, first, config)]
    assert len(set(rounds)) > 1
    quickest = rounds.index(min(rounds))
    stopped = in_turn(margin=0.0, window=1, steps=max(min(rounds), 1))
    both = seek_in_turn(upper, rows, first, config), seek_in_turn(upper, rows, first, stopped)
    assert torch.equal(both[0][quickest].values, both[1][quickest].values)


@pytest.mark.parametrize("schedule", ["together", "in_turn"])
def test_no_shift_outgrows_its_state(lab: SimpleNamespace, schedule: str) -> None:
    _, engine = cut(lab, "llama")
    prompts, targets = texts(lab)
    config = AnyEditConfig(
        chunks="windows", window=3, schedule=schedule, steps=25, clamp=0.25, margin=50.0, step=1.0
    )
    rows = engine.capture(prompts, targets)
    chunks = chunks_of(rows, config)
    if schedule == "in_turn":
        found = seek_in_turn(UpperModel(engine), rows, chunks, config)
    else:
        found = [seek_together(engine, r, c, config) for r, c in zip(rows, chunks, strict=True)]
    for row, of, shifts in zip(rows, chunks, found, strict=True):
        share = shifts.values.norm(dim=-1) / row.base[shifts.places].norm(dim=-1)
        assert share.max() <= 0.25 * (1 + 1e-5)
        assert share.max() > 0.2
        # A margin of 50 is out of reach: every step was made.
        assert shifts.rounds == (25 * len(of) if schedule == "in_turn" else 25)


def test_clamp_leaves_short_shifts_alone() -> None:
    shifts = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    clamp_(shifts, torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor(2.0), 4.0)
    assert_close(shifts, torch.tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]]))


def test_a_writer_works_in_turn_on_many_edits(load: Any) -> None:
    """Each shard makes the model say its answer, in order, whatever the company."""
    model, tokenizer = load()
    engine = SuffixEngine(model, layer_path(model, 1))
    config = in_turn(window=1, steps=60, margin=2.0, step=0.2)
    calls: list[int] = []
    edits = [*EDITS, A2, A3, *(replace(e, id=f"{e.id}-x") for e in EDITS)]
    writer = PassageWriter(engine, tokenizer, config, chat=False, in_half=False)
    written = writer.write(edits, calls.append)
    assert calls == list(range(1, len(edits) + 1))
    assert [outcome.edit.id for outcome, _ in written] == [edit.id for edit in edits]
    assert [shard.edit_ids for _, shard in written] == [[edit.id] for edit in edits]
    assert all(outcome.converged for outcome, _ in written)
    (alone, _), *_ = writer.write(edits[8:9])
    assert alone.iterations == pytest.approx(written[8][0].iterations, abs=2)
