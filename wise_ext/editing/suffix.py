"""The suffix engine: the frozen part of the model runs once, only what an edit changes runs again.

Editing layer L's down projection leaves everything below it constant, so a row (a prompt with its
target) is captured once: the activation ``a`` entering the projection and the hidden state leaving
block L. Training then iterates over blocks L+1…end and takes logits at label positions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.editing.anatomy import (
    blocks_around,
    first,
    is_additive,
    modules_after,
    run_until_stopped,
    watch,
)
from wise_ext.errors import ModelError
from wise_ext.ops import dual_linear_train

#: Widths are rounded up to this many tokens, so that few distinct shapes are ever captured.
_WIDTH_STEP = 8


@dataclass
class Row:
    """One captured sequence of ``t`` tokens: a prompt, and the target's labels if it has any.

    ``activation`` [t, d_ff] enters the edited projection. ``base`` [t, d_model] is what the side
    memory's output is added to: block L's output, or (``inputs`` [t, d_model] given) the
    projection's, where block L does more than add it to the residual stream.
    ``labels`` are the token ids predicted from position ``prompt_length - 1`` onwards.
    ``key`` [d_key] is the mean prompt activation at the routing layer, where one was asked for.
    """

    activation: Tensor
    base: Tensor
    inputs: Tensor | None
    prompt_length: int
    labels: Tensor
    key: Tensor | None

    def __len__(self) -> int:
        return self.activation.shape[0]


@dataclass(frozen=True)
class SuffixOutput:
    """Logits [n, vocabulary] at the label positions of all rows in order, the row each belongs to
    [n], its label [n], and each row's indicator [rows] (Eq. 3, mean over its prompt tokens)."""

    logits: Tensor
    row: Tensor
    labels: Tensor
    indicator: Tensor


class SuffixEngine:
    """Captures rows of a causal LM and replays the part of it above one edited projection.

    ``layer`` and ``key_layer`` are dotted paths of down projections, the latter (optional) not
    above the former. Raises ModelError where the model cannot be cut that way: its logits are
    compared with the model's own before anything is trained.
    """

    def __init__(
        self, model: nn.Module, layer: str, key_layer: str | None = None, pad_token: int = 0
    ):
        self.model = model
        self.projection = model.get_submodule(layer)
        self.key_projection = model.get_submodule(key_layer) if key_layer else None
        self.blocks, self.index = blocks_around(model, layer)
        self.pad_token = pad_token
        self.device = next(model.parameters()).device
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        config = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        self._softcap = getattr(text_config, "final_logit_softcapping", None)
        with torch.no_grad():
            self._tail = modules_after(model, self.blocks, self._probe_ids())
            block = self.blocks[self.index]
            self.additive = is_additive(model, block, self.projection, self._probe_ids())
            self._verify(layer)

    # -- capture ---------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[Row]:
        """Run the prefix once over prompt + target rows and keep what training needs.

        The last label is only ever predicted, so it is not part of the sequence.


        The rows given together share one padded batch: the same group captured again, on the same
        machine, gives the same bits, which resuming and undoing rely on.
        """
        sequences = [[*p, *t[:-1]] for p, t in zip(prompts, targets, strict=True)]
        ids = self._padded(sequences)
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            if self.key_projection is not None:
                stack.enter_context(watch(self.key_projection, "key", seen, entering=True))
            stack.enter_context(watch(self.projection, "activation", seen, entering=True))
            stack.enter_context(watch(self.blocks[self.index], "inputs", seen, entering=True))
            last = self.blocks[self.index] if self.additive else self.projection
            stack.enter_context(watch(last, "base", seen, entering=False, stop=True))
            run_until_stopped(self.model, ids)
        # OPT hands its FFN all rows' tokens in one list.
        seen = {name: _by_row(tensor, len(sequences)) for name, tensor in seen.items()}
        rows = []
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            n = len(sequences[i])
            key = seen["key"][i, : len(prompt)].float().mean(0) if "key" in seen else None
            rows.append(
                Row(
                    activation=seen["activation"][i, :n].clone(),
                    base=seen["base"][i, :n].clone(),
                    inputs=None if self.additive else seen["inputs"][i, :n].clone(),
                    prompt_length=len(prompt),
                    labels=torch.tensor(list(target), dtype=torch.long, device=self.device),
                    key=key,
                )
            )
        return rows

    @torch.no_grad()
    def keys(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Mean activation [rows, d_key] fp32 of each prompt at the key layer; nothing above runs.

        Raises:
            ModelError: the engine was made without a key layer.
        """
        if self.key_projection is None:
            raise ModelError("this engine has no key layer: name one when making it")
        seen: dict[str, Tensor] = {}
        with watch(self.key_projection, "key", seen, entering=True, stop=True):
            run_until_stopped(self.model, self._padded(prompts))
        key = _by_row(seen["key"], len(prompts)).float()
        return torch.stack([key[i, : len(p)].mean(0) for i, p in enumerate(prompts)])

    @torch.no_grad()
    def output_norm(self, rows: Sequence[Row]) -> float:
        """Median norm a token of the edited projection's own output over captured rows."""
        outputs = self.projection(torch.cat([r.activation for r in rows]))
        return float(outputs.float().norm(dim=-1).median())

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Token ids [rows, width], padded on the right, where causal attention never looks back."""
        width = _round_up(max(len(s) for s in sequences))
        ids = torch.full((len(sequences), width), self.pad_token, device=self.device)
        for i, s in enumerate(sequences):
            ids[i, : len(s)] = torch.tensor(s, device=self.device)
        return ids

    # -- replay ----------------------------------------------------------------------------------

    def run(self, rows: Sequence[Row], delta: Tensor, mask_bits: Tensor) -> SuffixOutput:
        """The suffix over captured rows with the side memory ``delta`` [d_model, d_ff] fp32.

        Differentiable in ``delta``; its gradient comes back masked. Real tokens alone enter the
        side matmul; pads follow them and, attention being causal, never reach them.
        """
        side, norms = self.side(rows, delta, mask_bits)
        lengths = [len(r) for r in rows]
        width = _round_up(max(lengths))
        index = _scatter_index(lengths, width, self.device)
        hidden = _pad(side, index, len(rows), width)
        if not self.additive:
            inputs = torch.cat([r.inputs for r in rows if r.inputs is not None])
            hidden = self._block_with_projection(
                _pad(inputs, index, len(rows), width), hidden, width
            )
        above = self.index + 1
        for block, (args, kwargs) in zip(
            self.blocks[above:], self._calls_for(width)[1:], strict=True
        ):
            hidden = first(block(hidden, *args, **kwargs))
        flat, row = _label_positions(rows, width, self.device)
        logits = self._logits(hidden.reshape(-1, hidden.shape[-1])[flat])
        labels = torch.cat([r.labels for r in rows])
        return SuffixOutput(logits, row, labels, _prompt_mean(rows, norms))

    def side(self, rows: Sequence[Row], delta: Tensor, mask_bits: Tensor) -> tuple[Tensor, Tensor]:
        """Base plus side output [tokens, d_model] and ||D a|| [tokens] of the rows' real tokens."""
        activation = torch.cat([r.activation for r in rows])
        base = torch.cat([r.base for r in rows])
        return dual_linear_train(activation, base, delta, mask_bits)

    def indicator(self, rows: Sequence[Row], delta: Tensor, mask_bits: Tensor) -> Tensor:
        """Eq. 3's routing indicator of each row [rows]: mean ||D a_t|| over its prompt tokens."""
        return _prompt_mean(rows, self.side(rows, delta, mask_bits)[1])

    # -- how the model is cut --------------------------------------------------------------------

    def _calls_for(self, width: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model passes to blocks L…end besides the hidden state, at this width.

        Right-padded rows under causal attention need no padding mask, so one dummy row serves
        every batch of its width: rotary tables, masks and positions all broadcast over rows.
        """
        if width not in self._calls:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                calls.append((args[1:], kwargs))

            ids = torch.full((1, width), self.pad_token, device=self.device)
            hooks = [
                b.register_forward_pre_hook(note, with_kwargs=True)
                for b in self.blocks[self.index :]
            ]
            try:
                with torch.no_grad():
                    self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            self._calls[width] = calls
        return self._calls[width]

    def _block_with_projection(self, inputs: Tensor, projected: Tensor, width: int) -> Tensor:
        """Block L over its own input, the projection's output replaced by ``projected``."""
        args, kwargs = self._calls_for(width)[0]
        hook = self.projection.register_forward_hook(
            lambda m, a, out: projected.reshape(out.shape).to(out.dtype)
        )
        try:
            return first(self.blocks[self.index](inputs, *args, **kwargs))
        finally:
            hook.remove()

    def _logits(self, hidden: Tensor) -> Tensor:
        for module in self._tail:
            hidden = module(hidden)
        logits = hidden.float()
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def _probe_ids(self) -> Tensor:
        return torch.arange(1, 1 + _WIDTH_STEP, device=self.device)[None]

    def _verify(self, layer: str) -> None:
        """The replayed logits must be the model's own before anyone trains on them."""
        ids = self._probe_ids()
        given = self.model(input_ids=ids, use_cache=False).logits[0]
        logits, logits_dtype = given.float(), given.dtype
        prompt, target = ids[0, :1].tolist(), ids[0, 1:].tolist()
        rows = self.capture([prompt], [target])
        d_model, d_ff = rows[0].base.shape[-1], rows[0].activation.shape[-1]
        delta = torch.zeros(d_model, d_ff, device=self.device)
        bits = torch.zeros(d_model, (d_ff + 31) // 32, dtype=torch.int32, device=self.device)
        error = (self.run(rows, delta, bits).logits - logits[:-1]).abs().max()
        tolerance = 1e-3 if logits_dtype == torch.float32 else 0.1
        if not error <= tolerance * logits.abs().max():
            raise ModelError(
                f"{type(self.model).__name__} cannot be replayed above {layer}: logits differ by "
                f"{float(error):.3g}; name a down projection inside the decoder's block list"
            )


def _by_row(tokens: Tensor, rows: int) -> Tensor:
    """[rows, width, d] from that or from [rows * width, d]."""
    return tokens.reshape(rows, -1, tokens.shape[-1])


def _round_up(width: int) -> int:
    return -(-width // _WIDTH_STEP) * _WIDTH_STEP


def _scatter_index(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Flat positions [tokens] in a [rows, width] grid of the rows' real tokens, in order."""
    return torch.cat([torch.arange(n, device=device) + i * width for i, n in enumerate(lengths)])


def _pad(tokens: Tensor, index: Tensor, rows: int, width: int) -> Tensor:
    """[tokens, d] into a zero-padded [rows, width, d]."""
    grid = tokens.new_zeros(rows * width, tokens.shape[-1])
    return grid.index_copy(0, index, tokens).view(rows, width, -1)


def _label_positions(
    rows: Sequence[Row], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Flat grid positions [n] that predict a label, and the row each belongs to [n]."""
    flat = [
        torch.arange(len(r.labels), device=device) + i * width + r.prompt_length - 1
        for i, r in enumerate(rows)
    ]
    row = [torch.full((len(r.labels),), i, device=device) for i, r in enumerate(rows)]
    return torch.cat(flat), torch.cat(row)


def _prompt_mean(rows: Sequence[Row], norms: Tensor) -> Tensor:
    """Mean of ``norms`` [tokens] over each row's prompt tokens -> [rows]."""
    parts = torch.split(norms, [len(r) for r in rows])
    return torch.stack([p[: r.prompt_length].mean() for p, r in zip(parts, rows, strict=True)])
