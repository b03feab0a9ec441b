"""GRACE: a codebook of values in place of one projection's output (arXiv 2211.11031)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wise_ext.editing.methods.base import (
    Lesson,
    Method,
    MethodConfig,
    MethodOutcome,
    Stopwatch,
)
from wise_ext.editing.methods.codebook import Codebook
from wise_ext.editing.practice import draw_seed
from wise_ext.editing.rows import Row
from wise_ext.editing.shifts import slopes
from wise_ext.models.real_tokens import real_tokens
from wise_ext.models.table import get_module, projection_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GraceConfig(MethodConfig):
    """Settings of GRACE: those of its code.

    Attributes:
        layer, chat, in_half: see :class:`MethodConfig`.
        radius: epsilon_init, a new entry's Euclidean radius.
        steps: at most this many steps of Adam on a value.
        learning_rate: Adam's.
        stop_loss: in nats a token; an edit ends when its loss is below it, 0 never. (GRACE's code
            names an early stop in its settings and runs all steps.)
        seed: of the values that training starts from.

    Raises:
        ConfigError: a value is out of range.
    """

    radius: float = 1.0
    steps: int = 100
    learning_rate: float = 1.0
    stop_loss: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("radius")
        self._check_count("steps")
        self._check_number("learning_rate")
        self._check_number("stop_loss", zero=True)
        self._check_count("seed", least=0)


class Grace(Method[GraceConfig]):
    """GRACE (Hartvigsen et al. 2023): a codebook beside one down projection; no weight changes.

    An edit's key is what enters the projection at the last real token of the prompt (with
    ``chat``, the last of the template). At the same token, and only there, the projection's output
    is replaced by the value of the entry that the key belongs to. (This is ``replace_last``, as
    EasyEdit, home of WISE's code, sets it for every model; the original code's ``replace_prompt``
    puts the value in place of the tokens before it.) What follows sees the value through attention.
    A value is trained on the whole target, from a start drawn uniformly from [0, 1) as in the code.

    Whether a row gets a value is decided once, when the model reads its prompt, wherever its pads
    are. A pass of a single token behind a cache goes on with a generation and looks up nothing:
    the cache holds what the prompt's value made of it. (EasyEdit looks up each new token as well.)
    Every other pass is taken for a prompt. So *generate* with a KV cache; without one, each step
    would be a prompt of its own. Likewise a teacher-forced pass over prompt and answer is taken for
    one long prompt: score GRACE by what it generates.
    """

    name = "grace"
    in_weights = False
    one_pass = False
    config_type: ClassVar[type[MethodConfig]] = GraceConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GraceConfig | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config)
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._hooks: list[RemovableHandle] = []
        self._last: Tensor | None = None
        self.codebook = Codebook(self.config.radius)

    def reset(self) -> None:
        """Forget every edit; nothing is left of the codebook in the model."""
        super().reset()
        self._detach()
        self.codebook = Codebook(self.config.radius)

    def _edit(self, lessons: list[Lesson], tick: Callable[[int], None]) -> list[MethodOutcome]:
        with self._detached():
            return super()._edit(lessons, tick)

    def _teach(self, batch: list[Lesson]) -> list[MethodOutcome]:
        (lesson,) = batch
        clock = Stopwatch()
        with clock.stage("capture"):
            (row,) = self._engine.capture([lesson.prompt], [lesson.target])
        with clock.stage("optimise"):
            key = row.activation[row.prompt_length - 1]
            shared = self.codebook.shared(key, lesson.target)
            start = self._start(lesson) if shared is None else self.codebook.values[shared]
            value, loss, steps = self._optimise(row, start)
        with clock.stage("write"):
            self.codebook.admit(key, lesson.target, value)
        return [MethodOutcome(lesson.edit.id, steps, loss, clock.seconds)]

    def _start(self, lesson: Lesson) -> Tensor:
        """What a new value is trained from, fp32 [d_model]."""
        seed = draw_seed(self.config.seed, "value", lesson.edit.id)
        generator = torch.Generator().manual_seed(seed)
        d_model, _ = projection_shape(self._engine.projection)
        return torch.rand(d_model, generator=generator).to(self._engine.device)

    def _optimise(self, row: Row, start: Tensor) -> tuple[Tensor, float, int]:
        """The value fp32 [d_model] trained from ``start``, its loss, and how many steps it took."""
        c, engine, place = self.config, self._engine, row.prompt_length - 1
        # What the block adds its projection's output to, at the token where that is replaced.
        rest = torch.zeros_like(start)
        if engine.additive:
            with torch.no_grad():
                own = engine.projection(row.activation[place][None])[0]
            rest = row.base[place].float() - own.float()
        value = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([value], lr=c.learning_rate)
        steps = 0
        while True:
            token = (rest + value).to(row.base.dtype)
            outputs = torch.cat([row.base[:place], token[None], row.base[place + 1 :]])
            hidden, _, labels = engine.above([row], outputs)
            gradient, _, loss = slopes(engine, hidden, labels, math.inf)
            if steps == c.steps or loss < c.stop_loss:
                return value.detach(), loss, steps
            (value.grad,) = torch.autograd.grad(hidden, value, gradient / len(labels))
            optimizer.step()
            steps += 1

    # -- in the model ----------------------------------------------------------------------------

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """The bare model meanwhile; the codebook is in it afterwards."""
        self._detach()
        try:
            yield
        finally:
            projection = get_module(self.model, self.layer)
            self._hooks = [
                self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
                projection.register_forward_hook(self._replace),
                self.model.register_forward_hook(self._end, always_call=True),
            ]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note each row's last real token, if this pass reads a prompt."""
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        batch, tokens = given.shape[:2]
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and tokens == 1:
            return
        mask = inputs.get("attention_mask")
        real = real_tokens(mask, batch, tokens, given.device, past)
        self._last = tokens - 1 - real.flip(1).int().argmax(1)

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Put values in place of what the projection gives for the tokens noted."""
        if self._last is None:
            return None
        batch = len(self._last)
        entering = args[0].detach()
        width = entering.numel() // (batch * entering.shape[-1])
        # OPT hands its FFN all rows' tokens in one list.
        flat = torch.arange(batch, device=self._last.device) * width + self._last
        entry = self.codebook.find(entering.reshape(-1, entering.shape[-1])[flat])
        found = entry >= 0
        if not bool(found.any()):
            return None
        replaced = output.reshape(-1, output.shape[-1]).clone()
        replaced[flat[found]] = self.codebook.values[entry[found]].to(output.dtype)
        return replaced.view_as(output)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = None
