"""The suffix engine: the frozen part of the model runs once, only what an edit changes runs again.

Editing layer L's down projection leaves everything below it constant, so a row (a prompt with its
target) is captured once: the activation ``a`` entering the projection and the hidden state leaving
block L. Training then iterates over blocks L+1…end, their feed-forwards on real tokens alone (the
last one's, like the logits, at label positions alone).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wise_ext.editing.anatomy import (
    blocks_around,
    feed_forwards,
    first,
    is_additive,
    modules_after,
    only_at,
    run_until_stopped,
    watch,
)
from wise_ext.editing.products import HalfProducts, half_is_fast, is_plain
from wise_ext.editing.quantised import is_quantised
from wise_ext.editing.rows import (
    Replayed,
    Row,
    SuffixOutput,
    label_positions,
    on_grid,
    places_on_grid,
    prompt_mean,
)
from wise_ext.errors import ModelError
from wise_ext.memory import TokenKeys
from wise_ext.models.parallel import is_shared_out
from wise_ext.models.weights import device_of
from wise_ext.ops import dual_linear_train

#: Widths are rounded up to this many tokens, so that few distinct shapes are ever captured.
_WIDTH_STEP = 8
#: The least margin, in logits, of labels trained in half precision, and what that may be off by.
HALF_MARGIN = 1.0
_HALF_ERROR = HALF_MARGIN / 2


class SuffixEngine:
    """Captures rows of a causal LM and replays the part of it above one edited projection.

    ``layer`` and ``key_layer`` are dotted paths of down projections, the latter (optional) not
    above the former. Raises ModelError where the model cannot be cut that way: its logits are
    compared with the model's own before anything is trained.
    """

    def __init__(
        self, model: nn.Module, layer: str, key_layer: str | None = None, pad_token: int = 0
    ):
        if is_shared_out(model):
            raise ModelError(
                "processes share this model's weights: edit it whole, in one process, save the "
                "memory, and load that into the shared model"
            )
        self.model = model
        self.projection = model.get_submodule(layer)
        self.key_projection = model.get_submodule(key_layer) if key_layer else None
        self.blocks, self.index = blocks_around(model, layer)
        self.pad_token = pad_token
        self.device = device_of(model)
        self._calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        config = getattr(model, "config", None)
        text_config = config.get_text_config() if config is not None else None
        self._softcap = getattr(text_config, "final_logit_softcapping", None)
        with torch.no_grad():
            self._tail = modules_after(model, self.blocks, self._probe_ids())
            block = self.blocks[self.index]
            self.additive = is_additive(model, block, self.projection, self._probe_ids())
            # Block L's own is watched, so it sees the whole grid.
            self._feed_forwards = feed_forwards(layer, self.blocks)
            self._feed_forwards[self.index] = None
            try:
                self._verify(layer)
            except Exception:
                # Not every feed-forward works on each token alone, and some break when asked to.
                self._feed_forwards = [None] * len(self.blocks)
                self._verify(layer)
            self._halves = self._close_halves(self._probe_texts(), _HALF_ERROR)
        self._prefix_halves = HalfProducts([])
        self._in_half = False

    # -- capture ---------------------------------------------------------------------------------

    @torch.no_grad()
    def capture(
        self,
        prompts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        in_half: bool = False,
    ) -> list[Row]:
        """Run the prefix once over prompt + target rows and keep what training needs.

        The last label is only ever predicted, so it is not part of the sequence. ``in_half``: for
        rows that need not be exact; see ``halve_captures``.

        Rows given together share one padded batch, whose feed-forwards see real tokens alone: the
        matrices are read once. The same rows captured together again, on the same machine, give
        the same bits, which resuming and undoing rely on.
        """
        sequences = [[*p, *t[:-1]] for p, t in zip(prompts, targets, strict=True)]
        if not sequences:
            return []
        with self._prefix_halves.used() if in_half else nullcontext():
            seen = self._entering(sequences)
        rows = []
        for i, sequence in enumerate(sequences):
            n = len(sequence)
            row = Row(
                activation=seen["activation"][i, :n].clone(),
                base=seen["base"][i, :n].clone(),
                inputs=None if self.additive else seen["inputs"][i, :n].clone(),
                prompt_length=len(prompts[i]),
                labels=torch.tensor(list(targets[i]), dtype=torch.long, device=self.device),
            )
            rows.append(row)
        return rows

    def _entering(self, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What a run up to block L shows of these rows, [rows, width, d] by name."""
        seen: dict[str, Tensor] = {}
        ids = self._padded(sequences)
        index = places_on_grid([len(s) for s in sequences], ids.shape[1], self.device)
        with ExitStack() as stack:
            for module in self._feed_forwards[: self.index]:
                stack.enter_context(only_at(module, index))
            stack.enter_context(watch(self.projection, "activation", seen, entering=True))
            stack.enter_context(watch(self.blocks[self.index], "inputs", seen, entering=True))
            last = self.blocks[self.index] if self.additive else self.projection
            stack.enter_context(watch(last, "base", seen, entering=False, stop=True))
            run_until_stopped(self.model, ids)
        # OPT hands its FFN all rows' tokens in one list.
        return {name: _by_row(tensor, len(sequences)) for name, tensor in seen.items()}

    @torch.no_grad()
    def halve_captures(self, texts: Sequence[Sequence[int]]) -> None:
        """Let captures ask for products in bf16, where that is fast and the logits of these texts,
        of two tokens and more, stay within ``HALF_MARGIN``. They should be texts as people write
        them: on tokens that never stand in one, some models lose all precision."""
        if not half_is_fast(self.device):
            return
        exact = self._unedited(texts)
        self._prefix_halves = HalfProducts(self.blocks[: self.index + 1])
        if not (self._unedited(texts, in_half=True) - exact).abs().max() <= HALF_MARGIN:
            self._prefix_halves = HalfProducts([])

    @torch.no_grad()
    def keys(self, prompts: Sequence[Sequence[int]]) -> list[TokenKeys]:
        """Each prompt's tokens at the key layer; nothing above it runs.

        Raises:
            ModelError: the engine was made without a key layer.
        """
        if self.key_projection is None:
            raise ModelError("this engine has no key layer: name one when making it")
        seen: dict[str, Tensor] = {}
        with watch(self.key_projection, "key", seen, entering=True, stop=True):
            run_until_stopped(self.model, self._padded(prompts))
        rows = _by_row(seen["key"], len(prompts))
        return [_key(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]

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
        """``replay``, and the logits of the whole vocabulary."""
        output = self.replay(rows, delta, mask_bits)
        return SuffixOutput(self.logits(output.hidden), *output[1:])

    def replay(self, rows: Sequence[Row], delta: Tensor, mask_bits: Tensor) -> Replayed:
        """The suffix over captured rows with the side memory ``delta`` [d_model, d_ff] fp32.

        Differentiable in ``delta``; its gradient comes back masked. Real tokens alone enter the
        side matmul; pads follow them and, attention being causal, never reach them.
        """
        side, norms = self.side(rows, delta, mask_bits)
        return Replayed(*self.above(rows, side), prompt_mean(rows, norms))

    def above(self, rows: Sequence[Row], outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The suffix over captured rows with ``outputs`` in place of their ``base``.

        Args:
            rows: captured.
            outputs: [tokens of all rows, d_model]; differentiable.

        Returns:
            Hidden states [n, d_model] at the label positions, ready for ``logits``, the row each
            belongs to [n], and its label [n].
        """
        lengths = [len(r) for r in rows]
        width = _round_up(max(lengths))
        index = places_on_grid(lengths, width, self.device)
        hidden = on_grid(outputs, index, len(rows), width)
        if not self.additive:
            inputs = torch.cat([r.inputs for r in rows if r.inputs is not None])
            hidden = self._block_with_projection(
                on_grid(inputs, index, len(rows), width), hidden, width
            )
        flat, row = label_positions(rows, width, self.device)
        above = self.blocks[self.index + 1 :]
        calls = self._calls_for(width)[1:]
        modules = self._feed_forwards[self.index + 1 :]
        for block, (args, kwargs), module in zip(above, calls, modules, strict=True):
            # Nobody sees pads, and of the last block only what predicts a label.
            with only_at(module, flat if block is above[-1] else index):
                hidden = first(block(hidden, *args, **kwargs))
        hidden = hidden.reshape(-1, hidden.shape[-1])[flat]
        for last in self._tail[:-1]:
            hidden = last(hidden)
        return hidden, row, torch.cat([r.labels for r in rows])

    @contextmanager
    def in_half(self) -> Iterator[None]:
        """Frozen products in bf16 meanwhile, where that is fast and the logits stay close (within
        half a logit on a probe, or see ``halve_replays``); as they are elsewhere."""
        self._in_half = True
        try:
            with self._halves.used():
                yield
        finally:
            self._in_half = False

    @torch.no_grad()
    def halve_replays(self, texts: Sequence[Sequence[int]]) -> None:
        """Let ``in_half`` go by the logits of these texts, of two tokens and more, which are to
        stay within ``HALF_MARGIN``. Without this it goes by a probe of tokens that never stand in
        one text; on such, a model's lower layers can lose the precision that they have on texts as
        people write them."""
        self._halves = self._close_halves(texts, HALF_MARGIN)

    @torch.no_grad()
    def unedited(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The model's logits of all but the first of texts' tokens by capture and replay, exactly
        and ``in_half``: fp32 [2, tokens, vocabulary]."""
        exact = self._unedited(texts)
        with self.in_half():
            return torch.stack([exact, self._unedited(texts, in_half=True)])

    @property
    def takes_tokens(self) -> bool:
        """Whether ``logits`` can be had for some tokens alone."""
        return is_plain(self._tail[-1])

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits fp32 [n, vocabulary] of ``replay``'s hidden states.

        Args:
            hidden: [n, d_model].
            tokens: int64 [k]: only theirs, [n, k], where ``takes_tokens``.
        """
        output = self._tail[-1]
        if tokens is None:
            logits: Tensor = output(hidden).float()
        elif isinstance(output, nn.Linear) and self._in_half and output in self._halves:
            logits = self._halves.linear(output, hidden, tokens)
        else:
            assert isinstance(output, nn.Linear)
            bias = None if output.bias is None else output.bias[tokens]
            logits = nn.functional.linear(hidden, output.weight[tokens], bias).float()
        if not self._softcap:
            return logits
        capped: Tensor = torch.tanh(logits / self._softcap) * self._softcap
        return capped

    def side(self, rows: Sequence[Row], delta: Tensor, mask_bits: Tensor) -> tuple[Tensor, Tensor]:
        """Base plus side output [tokens, d_model] and ||D a|| [tokens] of the rows' real tokens."""
        activation = torch.cat([r.entering() for r in rows])
        base = torch.cat([r.base for r in rows])
        return dual_linear_train(activation, base, delta, mask_bits)

    def indicator(self, rows: Sequence[Row], delta: Tensor, mask_bits: Tensor) -> Tensor:
        """Eq. 3's routing indicator of each row [rows]: mean ||D a_t|| over its prompt tokens."""
        return prompt_mean(rows, self.side(rows, delta, mask_bits)[1])

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

    def _probe_ids(self) -> Tensor:
        return torch.arange(1, 1 + _WIDTH_STEP, device=self.device)[None]

    def _verify(self, layer: str) -> None:
        """The replayed logits must be the model's own before anyone trains on them."""
        texts = self._probe_texts()
        given = [
            self.model(input_ids=torch.tensor([t], device=self.device), use_cache=False).logits[0]
            for t in texts
        ]
        logits, logits_dtype = torch.cat([g[:-1] for g in given]).float(), given[0].dtype
        error = (self._unedited(texts) - logits).abs().max()
        # Quantised layers may round what enters them, some by all of a batch.
        exact = logits_dtype == torch.float32 and not any(map(is_quantised, self.model.modules()))
        tolerance = 1e-3 if exact else 0.1
        if not error <= tolerance * logits.abs().max():
            raise ModelError(
                f"{type(self.model).__name__} cannot be replayed above {layer}: logits differ by "
                f"{float(error):.3g}; name a down projection inside the decoder's block list"
            )

    def _close_halves(self, texts: Sequence[Sequence[int]], within: float) -> HalfProducts:
        """Copies in bf16 of what replays multiply by; of nothing, where that would be no faster or
        these texts' logits move by more than ``within``."""
        if not half_is_fast(self.device):
            return HalfProducts([])
        halves = HalfProducts([*self.blocks[self.index + 1 :], *self._tail])
        exact = self._unedited(texts)
        with halves.used():
            error = (self._unedited(texts) - exact).abs().max()
        return halves if error <= within else HalfProducts([])

    def _probe_texts(self) -> list[list[int]]:
        """Two rows of different lengths, so that pads are there to be seen."""
        ids = self._probe_ids()[0].tolist()
        return [ids, ids[2:-3]]

    def _unedited(self, texts: Sequence[Sequence[int]], in_half: bool = False) -> Tensor:
        """The logits of texts [all tokens but the last, vocabulary] by capture and replay."""
        rows = self.capture([t[:1] for t in texts], [t[1:] for t in texts], in_half)
        d_model, d_ff = rows[0].base.shape[-1], rows[0].activation.shape[-1]
        delta = torch.zeros(d_model, d_ff, device=self.device)
        bits = torch.zeros(d_model, (d_ff + 31) // 32, dtype=torch.int32, device=self.device)
        return self.run(rows, delta, bits).logits


def _by_row(tokens: Tensor, rows: int) -> Tensor:
    """[rows, width, d] from that or from [rows * width, d]."""
    return tokens.reshape(rows, -1, tokens.shape[-1])


def _key(prompt: Sequence[int], activation: Tensor) -> TokenKeys:
    """The key of a prompt whose tokens come first in ``activation`` [width, d]."""
    ids = torch.tensor(list(prompt))
    return TokenKeys(ids, activation[: len(ids)].float().cpu()).last()


def _round_up(width: int) -> int:
    return -(-width // _WIDTH_STEP) * _WIDTH_STEP
