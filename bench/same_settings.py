"""The peer's own edit, computed as the suffix engine computes: same numbers, less work.

The objective, the batch, the optimiser and the number of iterations are EasyEdit's, its quirks
included (pads count in the activation distance; a row's loss is divided by one more than its
labels; weight decay comes after the gradient's mask). What differs is what is computed: the layers
below the edited one run once and not in every iteration, logits are taken at label positions alone,
the unrelated row, of which only the activation enters the loss, never sees the layers above, and
their feed-forward parts see no pads (the last one sees the labels' positions alone).

`wise_ext.editing.suffix` pads on the right and adds a side memory's output to a base; the peer
pads on the left, with a mask, and its weight takes the place of the base. Iterated 70 times at its
learning rate any rounding grows, so this keeps the peer's layout and order of operations, and
shares with the engine how a model is cut (`wise_ext.editing.anatomy`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wise_ext.editing.anatomy import (
    blocks_around,
    feed_forwards,
    first,
    is_additive,
    modules_after,
    only_at,
    watch,
)

IGNORED = -100
# The peer has it in its code, not in its hyperparameters.
WEIGHT_DECAY = 1e-5
# It stops early when its loss is small and stands still.
_STOP_CHANGE, _STOP_LOSS = 1e-4, 0.02


@dataclass(frozen=True)
class Recipe:
    """The peer's settings of an edit: iterations, SGD's rate, margins [Eq. 5], the largest change
    of an entry (None: no bound), and the activation function its distance is taken after."""

    iterations: int
    learning_rate: float
    alpha: float
    beta: float
    gamma: float
    bound: float | None
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, hparams: Any, model: nn.Module) -> Recipe:
        """From the peer's hyperparameters and the model they are applied to."""
        from transformers.activations import ACT2FN

        config: Any = model.config
        name = getattr(config, "hidden_act", None) or config.activation_function
        bound = hparams.norm_constraint
        return cls(
            iterations=hparams.n_iter,
            learning_rate=hparams.edit_lr,
            alpha=hparams.alpha,
            beta=hparams.beta,
            gamma=hparams.gamma,
            bound=bound if isinstance(bound, float) else None,
            activation=ACT2FN[name],
        )


@dataclass(frozen=True)
class Result:
    """The trained weight [d_out, d_in], optimiser steps taken, and the last loss."""

    weight: Tensor
    iterations: int
    loss: float


class Unsuited(Exception):
    """The model's blocks cannot be cut this way: one line that says why."""


class Replay:
    """A batch of the peer's, run once up to the edited projection, then from there on at will.

    Args:
        model: the unedited model, its projection at `layer` a plain linear one.
        layer: dotted path of that projection.
        batch: the peer's `input_ids`, `attention_mask` and `labels`, [rows, width] each; the last
            row is the unrelated text.

    Attributes:
        activation: what enters the projection, [rows, width, d_in].
        labels: the tokens to be said [n], at `positions` [n] of the flat [rows - 1, width] grid.
        row: the row of each label [n].
        counts: what each row's loss is divided by [rows - 1].

    Raises:
        Unsuited: the block does more with the projection's output than add it.
    """

    def __init__(self, model: nn.Module, layer: str, batch: dict[str, Tensor]) -> None:
        blocks, index = blocks_around(model, layer)
        projection = model.get_submodule(layer)
        if type(projection) is not nn.Linear or "bias" in dict(projection.named_parameters()):
            raise Unsuited(f"'{layer}' is no linear projection without a bias")
        ids = batch["input_ids"]
        with torch.no_grad():
            self._tail = modules_after(model, blocks, ids[:1])
            if not is_additive(model, blocks[index], projection, ids[:1]):
                raise Unsuited(f"the block of '{layer}' does more with its output than add it")
        self._above = blocks[index + 1 :]
        self._feed_forwards = feed_forwards(layer, self._above)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._capture(model, blocks[index], projection, batch)
        self._find_labels(batch["labels"])
        self._real = batch["attention_mask"][:-1].reshape(-1).nonzero().squeeze(1)

    @torch.no_grad()
    def _capture(
        self, model: nn.Module, block: nn.Module, projection: nn.Module, batch: dict[str, Tensor]
    ) -> None:
        rows = batch["input_ids"].shape[0]
        seen: dict[str, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self._calls.append(
                (
                    tuple(_without_last(each, rows) for each in args[1:]),
                    {name: _without_last(each, rows) for name, each in rest.items()},
                )
            )

        with ExitStack() as stack:
            stack.enter_context(watch(projection, "activation", seen, entering=True))
            stack.enter_context(watch(block, "residual", seen, entering=False))
            # Nothing added: the block then gives the residual stream itself, to the bit.
            silent = projection.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
            stack.callback(silent.remove)
            for each in self._above:
                hook = each.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            # The head is asked for one position: its logits are not wanted yet.
            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                logits_to_keep=1,
            )
        self.activation = seen["activation"].clone()
        self._residual = seen["residual"][:-1].clone()

    def _find_labels(self, labels: Tensor) -> None:
        width = labels.shape[1]
        flat, wanted, rows, counts = [], [], [], []
        for i, row in enumerate(labels[:-1].tolist()):
            # The peer's window opens one position before the first label: n labels count as n + 1.
            opens = row.count(IGNORED) - 2
            window = range(width - 1)[opens:]
            counts.append(len(window))
            for position in window:
                if row[position + 1] != IGNORED:
                    flat.append(i * width + position)
                    wanted.append(row[position + 1])
                    rows.append(i)
        device = labels.device
        self.positions = torch.tensor(flat, device=device)
        self.labels = torch.tensor(wanted, device=device)
        self.row = torch.tensor(rows, device=device)
        self.counts = torch.tensor(counts, device=device)

    def logits(self, output: Tensor) -> Tensor:
        """Logits [n, vocabulary] at the labels, for the projection's output [rows, width, d]."""
        hidden = self._residual + output[:-1]
        above = zip(self._above, self._calls, self._feed_forwards, strict=True)
        for block, (args, kwargs), module in above:
            # Nobody sees pads, and of the last block only what a logit is made of.
            with only_at(module, self.positions if block is self._above[-1] else self._real):
                hidden = first(block(hidden, *args, **kwargs))
        hidden = hidden.reshape(-1, hidden.shape[-1])[self.positions]
        for module in self._tail:
            hidden = module(hidden)
        return hidden


def train(
    model: nn.Module,
    layer: str,
    batch: dict[str, Tensor],
    weight: Tensor,
    mask: Tensor,
    recipe: Recipe,
) -> Result:
    """One edit with the peer's settings.

    Args:
        model: the unedited model.
        layer: dotted path of the projection.
        batch: as `Replay` takes it.
        weight: where the edit starts [d_out, d_in]; left as it is.
        mask: 0/1, of as many entries.
        recipe: the settings.

    Raises:
        Unsuited: see `Replay`.
    """
    replay = Replay(model, layer, batch)
    original = model.get_submodule(layer).weight
    assert isinstance(original, Tensor)
    with torch.no_grad():
        unedited = recipe.activation(F.linear(replay.activation, original))
    weight = weight.detach().clone().requires_grad_()
    mask = mask.view_as(weight).to(weight.dtype)
    least = most = None
    if recipe.bound is not None:
        least, most = original.detach() - recipe.bound, original.detach() + recipe.bound
    before, latest = 0.0, 1e9
    steps = 0
    for _ in range(recipe.iterations):
        if abs(latest - before) <= _STOP_CHANGE and latest <= _STOP_LOSS:
            break
        output = F.linear(replay.activation, weight)
        loss = _label_loss(replay, replay.logits(output)) + _activation_loss(
            output, unedited, recipe
        )
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            gradient = (gradient * mask).add(weight, alpha=WEIGHT_DECAY)
            weight.add_(gradient, alpha=-recipe.learning_rate)
            if least is not None:
                weight.clamp_(least, most)
        before, latest = latest, loss.item()
        steps += 1
    return Result(weight.detach(), steps, latest)


def _label_loss(replay: Replay, logits: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, replay.labels, reduction="none")
    sums = losses.new_zeros(len(replay.counts)).index_add(0, replay.row, losses)
    return (sums / replay.counts).mean()


def _activation_loss(output: Tensor, unedited: Tensor, recipe: Recipe) -> Tensor:
    """Eq. 5 of the rows' mean distances, pads among them; the last row is the unrelated one."""
    distance = (recipe.activation(output) - unedited).norm(dim=-1).mean(dim=-1)
    inside, outside = distance[:-1], distance[-1:]
    terms = (outside - recipe.alpha, recipe.beta - inside, outside - inside + recipe.gamma)
    return sum((_mean_of_positive(term) for term in terms), start=distance.new_zeros(()))


def _mean_of_positive(values: Tensor) -> Tensor:
    positive = values[values > 0]
    return positive.mean() if positive.numel() else values.new_zeros(())


def _without_last(value: Any, rows: int) -> Any:
    """A block's argument for all rows but the last: a mask is given by row, a table is not."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
        return value[:-1]
    if isinstance(value, (tuple, list)):
        return type(value)(_without_last(each, rows) for each in value)
    return value
