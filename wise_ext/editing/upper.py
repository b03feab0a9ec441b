"""The model above one projection, run from what it puts out, a few tokens at a time.

The blocks below hand on what they are given, so the model itself still makes masks, rotary tables
and logits, whatever its architecture. What comes before those tokens is run once and kept, as keys
and values of the blocks above.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from wise_ext.editing.anatomy import returns_tuples
from wise_ext.editing.rows import Row
from wise_ext.editing.suffix import SuffixEngine


class Stretch(NamedTuple):
    """Some neighbouring tokens of each of several rows, padded on the right.

    Attributes:
        outputs: [rows, width, d_model], as a ``Row``'s ``base``.
        inputs: the same of its ``inputs``, where it has them.
        positions: int64 [rows, width]: places in the row.
        real: bool [rows, width]: False for pads.
    """

    outputs: Tensor
    inputs: Tensor | None
    positions: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], begins: Sequence[int], outputs: Sequence[Tensor]) -> Stretch:
        """The tokens of each row from ``begins`` on, with ``outputs`` [n, d_model] in place of
        their ``base``; ``n`` may be another for each row, and 0."""
        device = rows[0].base.device
        lengths = torch.tensor([len(o) for o in outputs], device=device)
        steps = torch.arange(int(lengths.max()), device=device)
        inputs = [
            row.inputs[begin : begin + len(o)]
            for row, begin, o in zip(rows, begins, outputs, strict=True)
            if row.inputs is not None
        ]
        return cls(
            pad_sequence(list(outputs), batch_first=True),
            pad_sequence(inputs, batch_first=True) if inputs else None,
            torch.tensor(list(begins), device=device)[:, None] + steps,
            steps < lengths[:, None],
        )


class Prefix:
    """Keys and values of tokens that no longer change, of each row the last ones at the right: so
    that what follows is next to them, and a sliding window reaches as far as it should.

    Attributes:
        real: bool [rows, tokens]: False for the pads in front of shorter rows.
        states: of each block that runs, [rows, heads, tokens, width] twice.
    """

    def __init__(self, real: Tensor, states: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.real = real
        self.states = list(states)

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Prefix:
        """Nothing comes before."""
        return cls(torch.zeros(rows, 0, dtype=torch.bool, device=device))

    def __len__(self) -> int:
        return self.real.shape[1]

    def keep(self, rows: Sequence[int]) -> Prefix:
        """Of these rows alone."""
        index = torch.tensor(list(rows), device=self.real.device)
        real = self.real[index]
        first = len(self) - int(real.sum(1).max())
        states = [(k[index][:, :, first:], v[index][:, :, first:]) for k, v in self.states]
        return Prefix(real[:, first:], states)


class UpperModel:
    """A causal LM from the output of an engine's projection on."""

    def __init__(self, engine: SuffixEngine) -> None:
        self._model = engine.model
        self._projection = engine.projection
        self._blocks = engine.blocks
        # Where the block does more than add the projection's output, it runs again.
        self._first = engine.index + 1 if engine.additive else engine.index
        self._takes = set(inspect.signature(engine.model.forward).parameters)
        self._tuples = returns_tuples(engine.model, engine.blocks[0])

    def logits(self, stretch: Stretch, prefix: Prefix) -> Tensor:
        """Logits [rows, width, vocabulary] of a stretch behind a prefix, those of pads without
        meaning; differentiable in ``stretch.outputs``."""
        return self._run(stretch, prefix)[0]

    @torch.no_grad()
    def extended(self, prefix: Prefix, stretch: Stretch) -> Prefix:
        """The prefix and a stretch behind it, as one prefix."""
        if not stretch.real.any():
            return prefix
        keeping = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        _, cache = self._run(stretch, prefix, **keeping)
        real = torch.cat([prefix.real, stretch.real], 1)
        # A stable sort brings each row's pads to its front and leaves its tokens in order.
        order = real.long().argsort(dim=1, stable=True)
        order = order[:, real.shape[1] - int(real.sum(1).max()) :]
        real = real.gather(1, order)
        states = [
            (_taken(layer.keys, order, real), _taken(layer.values, order, real))
            for layer in cache.layers[self._first :]
        ]
        return Prefix(real, states)

    def _run(self, stretch: Stretch, prefix: Prefix, **options: Any) -> tuple[Tensor, Any]:
        cache = self._cache(prefix, stretch.outputs)
        mask = torch.cat([prefix.real, stretch.real], 1).long()
        if "position_ids" in self._takes:
            options["position_ids"] = stretch.positions
        ids = torch.zeros_like(stretch.positions)
        with self._given(stretch.outputs, stretch.inputs):
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return output.logits, cache

    def _cache(self, prefix: Prefix, like: Tensor) -> Any:
        """A cache that begins with the prefix; blocks that do not run have one of its length."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        if len(prefix):
            blank = like.new_zeros(()).expand(like.shape[0], 1, len(prefix), 1)
            for number in range(self._first):
                cache.update(blank, blank, number)
            for number, states in enumerate(prefix.states, self._first):
                cache.update(*states, number)
        return cache

    @contextmanager
    def _given(self, outputs: Tensor, inputs: Tensor | None) -> Iterator[None]:
        """The model starts with these meanwhile."""
        start = outputs if inputs is None else inputs
        skipped = self._blocks[: self._first]
        # Others replace a block's forward as well (Accelerate does).
        replaced = [vars(block).get("forward") for block in skipped]
        for number, block in enumerate(skipped):
            given = start if number == 0 else None
            block.forward = _passing(given, self._tuples)
        hooks = []
        if inputs is not None:
            hooks.append(self._projection.register_forward_hook(_replaced_by(outputs)))
            if not skipped:
                hooks.append(_entered_by(self._blocks[0], inputs))
        try:
            yield
        finally:
            for block, before in zip(skipped, replaced, strict=True):
                if before is None:
                    del block.forward
                else:
                    block.forward = before
            for hook in hooks:
                hook.remove()


def _taken(states: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """States [rows, heads, tokens, width] at the tokens ``order`` [rows, n] of each row, zero where
    they are not real: a row of pads alone may have come out as NaN."""
    index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index).masked_fill(~real[:, None, :, None], 0)


def _passing(given: Tensor | None, tuples: bool) -> Any:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        passed = hidden_states if given is None else given
        return (passed,) if tuples else passed

    return forward


def _replaced_by(outputs: Tensor) -> Any:
    return lambda module, args, output: outputs.reshape(output.shape).to(output.dtype)


def _entered_by(block: nn.Module, inputs: Tensor) -> Any:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (inputs, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": inputs}

    return block.register_forward_pre_hook(enter, with_kwargs=True)
