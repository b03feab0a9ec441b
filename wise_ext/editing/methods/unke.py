"""UnKE: one block is trained until it puts out what makes the model say an answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from wise_ext.editing.anatomy import first, run_until_stopped
from wise_ext.editing.methods.base import (
    Lesson,
    Method,
    MethodConfig,
    MethodOutcome,
    Stopwatch,
)
from wise_ext.editing.methods.observing import around_block
from wise_ext.editing.methods.seeking import ChunkedConfig, Needed, Seeker, Wish
from wise_ext.editing.prompts import encode_prompt, neutral_prompts
from wise_ext.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The paper edits layer 7 of Llama's 32.
_DEPTH = 8 / 32


@dataclass(frozen=True)
class UnkeConfig(ChunkedConfig):
    """Settings of UnKE: those of its published code for Llama-3-8B.

    Attributes:
        layer: a down projection of the block that is trained; ``"auto"`` is as deep as block 7 of
            32.
        fit_steps: steps of AdamW on the block.
        fit_rate: its learning rate.
        fit_decay: its weight decay, of matrices alone.
        preserved: so many neutral texts are to be put out as before.
        batch_size: edits of one call that are written together.
        chat, in_half, steps, step, clamp, stop_loss, contexts, context_tokens, essence, decay,
            seed, chunks, window, overlap, language, schedule, margin: see :class:`ChunkedConfig`.
            The shift is at the prompt's last token, so there is no ``essence`` to keep.

    Raises:
        ConfigError: a value is out of range.
    """

    contexts: int = 0
    stop_loss: float = 5e-3
    fit_steps: int = 50
    fit_rate: float = 2e-4
    fit_decay: float = 1e-2
    preserved: int = 20
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("fit_steps")
        self._check_count("batch_size")
        self._check_count("preserved", 0)
        self._check_number("fit_rate")
        self._check_number("fit_decay", zero=True)


class Passing(NamedTuple):
    """How the model calls a block for some rows, and what of its output is real.

    Attributes:
        args, kwargs: of the call.
        real: bool [rows, width].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: Tensor


class Unke(Method[UnkeConfig]):
    """UnKE (Deng et al. 2025, arXiv 2405.15349).

    A shift of a block's output at the prompt's last token is sought that makes the model say the
    whole answer; then all weights of the block are trained (AdamW, mean squared errors) to put out
    the shifted states, and the unchanged ones at other tokens of the text and on neutral texts.
    With ``chunks``, the text is prompt and answer, with a shift before each chunk.
    """

    name = "unke"
    depth = _DEPTH
    config_type: ClassVar[type[MethodConfig]] = UnkeConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: UnkeConfig | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config)
        self._block = self._engine.blocks[self._engine.index]
        blocks, number, _ = around_block(self.layer)
        self._path = f"{blocks}.{number}"
        for name, parameter in self._block.named_parameters():
            if not parameter.is_floating_point():
                raise ModelError(
                    f"'{self._path}.{name}' cannot be trained: load the model in fp32, bf16 or "
                    "fp16, not quantised"
                )
        self._seeker = Seeker(self._engine, tokenizer, self.config, at_subject=False)

    def _teach(self, batch: list[Lesson]) -> list[MethodOutcome]:
        clock = Stopwatch()
        with clock.stage("seek"):
            wishes = self._seeker.wishes(batch)
        with clock.stage("fit"):
            parts = [self._edited(wishes)]
            if self.config.preserved:
                parts.append(self._preserved())
            weights = self._fitted(parts)
        with clock.stage("write"), torch.no_grad():
            for name, parameter in self._block.named_parameters():
                self.originals.keep(f"{self._path}.{name}", parameter)
                parameter.copy_(weights[name])
        seconds = clock.share(len(batch))
        return [
            MethodOutcome(lesson.edit.id, wish.rounds, wish.loss, dict(seconds))
            for lesson, wish in zip(batch, wishes, strict=True)
        ]

    def _fitted(self, parts: Sequence[tuple[Passing, Tensor]]) -> dict[str, Tensor]:
        """The block's weights, fp32, after training on calls and what is to come out of them."""
        c = self.config
        weights = {
            name: parameter.detach().float().clone().requires_grad_()
            for name, parameter in self._block.named_parameters()
        }
        groups = [
            {"params": [w for w in weights.values() if w.dim() > 1], "weight_decay": c.fit_decay},
            {"params": [w for w in weights.values() if w.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=c.fit_rate)
        dtypes = {name: parameter.dtype for name, parameter in self._block.named_parameters()}
        for _ in range(c.fit_steps):
            loss = torch.zeros((), device=self._engine.device)
            for passing, goal in parts:
                # Trained in fp32, used as the model would.
                used = {name: weight.to(dtypes[name]) for name, weight in weights.items()}
                given = first(functional_call(self._block, used, passing.args, passing.kwargs))
                loss = loss + F.mse_loss(given[passing.real].float(), goal)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return weights

    def _edited(self, wishes: Sequence[Wish]) -> tuple[Passing, Tensor]:
        """How the block is called for the edits' texts, and what is to come out."""
        texts = [text for wish in wishes for text in wish.texts]
        places = [at for wish in wishes for at in wish.places]
        values = [wish.values for wish in wishes for _ in wish.texts]
        passing = self._passing(texts)
        rows = torch.cat([torch.full_like(at, row) for row, at in enumerate(places)])
        width = passing.real.shape[1]
        flat, shift = rows * width + torch.cat(places), torch.cat(values)
        with shifted(self._engine.projection, flat, shift):
            return passing, self._output(passing)

    def _preserved(self) -> tuple[Passing, Tensor]:
        prompts = neutral_prompts()[: self.config.preserved]
        passing = self._passing([encode_prompt(self.tokenizer, text) for text in prompts])
        return passing, self._output(passing)

    @torch.no_grad()
    def _output(self, passing: Passing) -> Tensor:
        """What the block puts out for real tokens, fp32 [n, d_model]."""
        output = first(self._block(*passing.args, **passing.kwargs))
        return output[passing.real].float()

    def _passing(self, texts: Sequence[Sequence[int]]) -> Passing:
        """How the block is called for texts padded on the right, where nothing looks back."""
        width, device = max(len(text) for text in texts), self._engine.device
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = self._block.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                run_until_stopped(self.model, ids)
        finally:
            hook.remove()
        real = torch.arange(width, device=device) < lengths[:, None]
        return Passing(*calls[0], real)


@contextmanager
def shifted(projection: nn.Module, places: Tensor, values: Tensor) -> Iterator[None]:
    """A projection puts out more meanwhile: ``values`` [n, d] at the flat ``places`` [n] of the
    grid of tokens it is called with."""

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        flat = output.reshape(-1, output.shape[-1])
        return flat.index_add(0, places, values.to(flat.dtype)).view_as(output)

    hook = projection.register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class AnyEditUnkeConfig(Needed, UnkeConfig):
    """Settings of AnyEdit with UnKE.

    Attributes: see :class:`Needed` and :class:`UnkeConfig`.
    """

    fit_steps: int = 200
    fit_rate: float = 1e-3


class AnyEditUnke(Unke):
    """AnyEdit (arXiv 2502.05628) on top of UnKE: answers of any length."""

    name = "anyedit-unke"
    config_type: ClassVar[type[MethodConfig]] = AnyEditUnkeConfig
