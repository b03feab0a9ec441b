"""What editors have in common that change a model itself: edits in, a changed model, and back.

A method changes the model in place, later calls build on earlier ones, and ``reset`` undoes all of
it to the bit. Methods on one model are to be reset in reverse order, like any other change of it.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from wise_ext.editing.anatomy import frozen
from wise_ext.editing.edits import Edit
from wise_ext.editing.ledger import check_ids
from wise_ext.editing.progress import ProgressCallback, counted
from wise_ext.editing.prompts import encode_prompt, encode_target, neutral_prompts
from wise_ext.editing.settings import Settings
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.errors import ConfigError, DataError, ModelError
from wise_ext.models.patch import is_patched
from wise_ext.models.table import get_module, layer_path, projection_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Neutral texts that say whether half precision will do.
_PROBES = 4


@dataclass(frozen=True)
class MethodConfig(Settings):
    """Settings that every method has.

    Attributes:
        layer: the down projection to edit: ``"auto"`` (about five sixths of the depth), a block's
            number, or a dotted module path.
        chat: put prompts into the tokenizer's chat template.
        in_half: work out frozen products above the layer in bf16, where the machine has units for
            that and the logits stay close (``SuffixEngine.halve_replays``).

    Raises:
        ConfigError: a value is of the wrong kind.
    """

    layer: str | int = "auto"
    chat: bool = False
    in_half: bool = False

    def _check_number(self, name: str, *, zero: bool = False) -> None:
        """A finite number above 0, or, with ``zero``, 0."""
        value = getattr(self, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ConfigError(f"{name} is {value!r}: give a number {'>= 0' if zero else '> 0'}")

    def _check_count(self, name: str, least: int = 1) -> None:
        """A whole number from ``least`` on."""
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"{name} is {value!r}: give a whole number >= {least}")


@dataclass(frozen=True)
class MethodOutcome:
    """How one edit went.

    Attributes:
        edit_id: the edit's id.
        iterations: optimiser steps.
        loss: the mean negative log likelihood of the target's tokens when training ended, in nats,
            penalties left out.
        seconds: CPU seconds of this process by stage; edits worked on together share them equally.
    """

    edit_id: str
    iterations: int
    loss: float
    seconds: dict[str, float]


class Lesson(NamedTuple):
    """An edit as token ids: the prompt's, and the target's with the stop token."""

    edit: Edit
    prompt: list[int]
    target: list[int]


class Originals:
    """The values that parameters had before they were first changed.

    Nothing is copied of parameters that nobody changes; the copies stay where the parameters are.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def keep(self, name: str, parameter: nn.Parameter) -> None:
        """Remember a parameter's values, unless that has been done under this name."""
        if name not in self._kept:
            self._kept[name] = (parameter, parameter.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        """Give every parameter its values back, bit for bit, and forget them."""
        for parameter, original in self._kept.values():
            parameter.copy_(original)
        self._kept.clear()

    @torch.no_grad()
    def changed(self) -> dict[str, Tensor]:
        """What was added so far to each parameter that differs from its original, by name, shaped
        as the module stores it, in fp32 (fp64 for fp64)."""
        wide = {torch.float64: torch.float64}
        deltas = {}
        for name, (parameter, original) in self._kept.items():
            if not torch.equal(parameter, original):
                dtype = wide.get(original.dtype, torch.float32)
                deltas[name] = parameter.detach().to(dtype) - original.to(dtype)
        return deltas


@dataclass
class Stopwatch:
    """CPU seconds of this process, all threads, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What the block takes goes to this stage."""
        start = time.process_time()
        try:
            yield
        finally:
            spent = time.process_time() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def share(self, edits: int) -> dict[str, float]:
        """The equal share of each of so many edits."""
        return {name: spent / edits for name, spent in self.seconds.items()}


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Method(ABC, Generic[ConfigT]):
    """An editor that changes the model itself.

    Usable as a context manager, which resets at its end. While it works, the model is in
    evaluation mode and no parameter takes a gradient; both are as before afterwards.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        config: settings, of the method's ``config_type``; None for the defaults.

    Raises:
        ConfigError: settings of another method, or the model has a side memory.
        ModelError: the model has no such layer.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[MethodConfig]]
    #: Whether all that it does is in the model's weights.
    in_weights: ClassVar[bool] = True
    #: Whether what it does shows where prompt and answer are read in one pass.
    one_pass: ClassVar[bool] = True
    #: How deep the layer is that ``"auto"`` names, as a share of the blocks.
    depth: ClassVar[float] = 5 / 6

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ConfigT | None = None,
    ) -> None:
        given = self.config_type() if config is None else config
        if not isinstance(given, self.config_type):
            raise ConfigError(
                f"{self.name} takes a {self.config_type.__name__}, not a {type(given).__name__}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = cast(ConfigT, given)
        self.originals = Originals()
        self._refuse_patched()
        self.layer = layer_path(model, self.config.layer, self.depth)
        with frozen(model):
            self._engine = SuffixEngine(model, self.layer)
            if self.config.in_half:
                texts = (encode_prompt(tokenizer, text) for text in neutral_prompts()[:_PROBES])
                self._engine.halve_replays([ids for ids in texts if len(ids) > 1])

    def edit(
        self, edits: Sequence[Edit], progress: bool | ProgressCallback = False
    ) -> list[MethodOutcome]:
        """Write edits into the model, on top of what was written before.

        Args:
            edits: all of them are read before any is written.
            progress: True shows a bar on a terminal; a function is called with (done, total).

        Returns:
            One outcome an edit, in order.

        Raises:
            ConfigError: the model has a side memory, or ``chat`` is set and there is no template.
            DataError: something is no edit, an id appears twice, or an edit has no tokens, or more
                than the model takes.
        """
        self._refuse_patched()
        lessons = self._lessons(edits)
        if not lessons:
            return []
        bar = counted(self.name, len(edits), progress)
        # Also for callers who have switched gradients off.
        half = self._engine.in_half() if self.config.in_half else nullcontext()
        with frozen(self.model), torch.enable_grad(), half, bar as tick:
            return self._edit(lessons, tick)

    def reset(self) -> None:
        """Undo every edit: the model has the very bits and module objects it had before."""
        self.originals.restore()

    def _edit(self, lessons: list[Lesson], tick: Callable[[int], None]) -> list[MethodOutcome]:
        """Write lessons, at least one, in batches; ``tick`` counts those that are done."""
        outcomes = []
        size = getattr(self.config, "batch_size", 1)
        for start in range(0, len(lessons), size):
            batch = lessons[start : start + size]
            outcomes += self._teach(batch)
            tick(len(batch))
        return outcomes

    @abstractmethod
    def _teach(self, batch: list[Lesson]) -> list[MethodOutcome]:
        """Write some lessons together: as many as the settings' ``batch_size``, or one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.reset()

    def _add(self, layer: str, delta: Tensor) -> None:
        """Add ``delta`` [d_out, d_in] to the weight of the projection at ``layer``."""
        projection = get_module(self.model, layer)
        weight = weight_of(projection, layer)
        self.originals.keep(f"{layer}.weight", weight)
        with torch.no_grad():
            # in place, and rounded once: other modules may hold the parameter
            weight.copy_(weight + oriented(projection, delta).to(weight.device))

    def _refuse_patched(self) -> None:
        if is_patched(self.model):
            raise ConfigError(
                f"{self.name} edits the model's own weights, and this {type(self.model).__name__} "
                "has a side memory: take that off first with wise_ext.unload(model)"
            )

    def _lessons(self, edits: Sequence[Edit]) -> list[Lesson]:
        for edit in edits:
            if not isinstance(edit, Edit):
                raise DataError(
                    f"{self.name} was given a {type(edit).__name__} as an edit: make a "
                    "wise_ext.Edit of it, or read a file with wise_ext.read_edits"
                )
        check_ids(edits, set())
        text_config = self.model.config.get_text_config()
        most = getattr(text_config, "max_position_embeddings", None) or math.inf
        lessons = []
        for edit in edits:
            prompt = encode_prompt(self.tokenizer, edit.prompt, self.config.chat)
            target = encode_target(self.tokenizer, edit.target_new, chat=self.config.chat)
            if len(prompt) + len(target) > most:
                raise DataError(
                    f"edit {edit.id!r} has {len(prompt) + len(target)} tokens, and the model takes "
                    f"{most}: shorten its prompt or its target"
                )
            lessons.append(Lesson(edit, prompt, target))
        return lessons


def weight_of(projection: nn.Module, layer: str) -> nn.Parameter:
    """The weight of a linear projection, which an editor may write to.

    Raises:
        ModelError: the module at path ``layer`` has no matrix of floating-point numbers.
    """
    weight = getattr(projection, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2:
        return weight
    raise ModelError(
        f"'{layer}' ({type(projection).__name__}) has no weight that can be written to: load the "
        "model in fp32, bf16 or fp16, not quantised"
    )


def oriented(projection: nn.Module, matrix: Tensor) -> Tensor:
    """``matrix`` [d_out, d_in] as the projection stores it: turned over in GPT-2's Conv1D."""
    projection_shape(projection)
    return matrix.T if hasattr(projection, "nf") else matrix
