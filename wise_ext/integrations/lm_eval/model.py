"""A patched model behind the harness's interface, routed as it is when generating."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ... import models
from ...editing.loading import load_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: what the harness scores: (texts, or None for a whole text, context ids, continuation ids)
Request: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]
#: the places of those requests that the logits of one row answer
Group: TypeAlias = list[int]


class WiseLM(HFLM):  # type: ignore[misc]
    """HFLM with a side memory: the harness's model ``wise-ext``.

    A continuation is scored on the route that its context alone takes, as generation would; a whole
    text (``loglikelihood_rolling``) decides for itself. Batches are HFLM's own, so that on main
    memory, or without a memory, every figure is HFLM's to the digit.

    Args:
        pretrained: a model (patched or not), or whatever ``wise_ext.load_model`` takes.
        tokenizer: its tokenizer, where a model is given.
        memory: a saved memory to patch the model with.
        dtype: see ``wise_ext.load_model``.
        device: see ``wise_ext.load_model``; the harness says "cuda" where it means "the GPU".
        check: what the model has to share with the memory's base: see ``load_memory``.
        options: HFLM's others (``batch_size``, ``max_length``, …).

    Raises:
        ConfigError: no such check.
        ModelError: the model cannot be loaded, or has no such layer.
        StorageError: the memory is unusable, or of another model.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        memory: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        check: str = "weights",
        **options: Any,
    ) -> None:
        model: Any = pretrained
        if isinstance(pretrained, str):
            model, tokenizer = models.load_model(pretrained, dtype, device or "auto")
        if memory is not None:
            load_memory(model, memory, check=check)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations, each on the route of its context.

        The model has to be told how many tokens of each row decide, so the rows of a batch must be
        known: batches are made here, in HFLM's order and of its size, and handed to it one by one.
        """
        own = super()._loglikelihood_tokens
        if not models.is_patched(self.model):
            scores: list[tuple[float, bool]] = own(requests, disable_tqdm, override_bs)
            return scores
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="scoring") as bar:
            for batch in self._batches(requests, override_bs):
                lengths = [self._deciding(requests[group[0]]) for group in batch]
                places = [place for group in batch for place in group]
                with models.prompt_lengths(self.model, lengths):
                    part = own([requests[place] for place in places], True, len(batch))
                found.update(zip(places, part, strict=True))
                bar.update(len(places))
        return [found[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Request], size: int | None) -> Iterator[list[Group]]:
        """Batches of groups, a group a row of the batch, in the order in which HFLM takes them.

        HFLM reads rows of equal tokens once, wherever their contexts end. Here they must end at the
        same place, too: those that differ go into a later round.
        """
        rounds: list[dict[tuple[int, ...], tuple[int, Group]]] = []
        for place, (_, context, continuation) in enumerate(requests):
            row = (*context, *continuation[:-1])
            for groups in rounds:
                length, group = groups.setdefault(row, (len(context), []))
                if length == len(context):
                    group.append(place)
                    break
            else:
                rounds.append({row: (len(context), [place])})
        for groups in rounds:
            rows = [group for _, group in groups.values()]
            rows.sort(key=lambda group: _order(requests[group[0]]))
            size = size or self._size([requests[group[0]] for group in rows])
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def _size(self, rows: Sequence[Request]) -> int:
        """Rows in a batch; under "auto" as many as the longest of them lets the device hold."""
        if self.batch_size == "auto":
            return int(self._detect_batch_size(rows))
        return int(self.batch_size)

    def _deciding(self, request: Request) -> int:
        """How many tokens of a row decide its route, of what HFLM's truncation leaves of it."""
        texts, context, continuation = request
        row = min(len(context) + len(continuation) - 1, int(self.max_length))
        return row if texts is None else row - (len(continuation) - 1)


def _order(request: Request) -> tuple[int, tuple[int, ...]]:
    """HFLM's: the longest first."""
    _, context, continuation = request
    tokens = (*context, *continuation)
    return -len(tokens), tokens
