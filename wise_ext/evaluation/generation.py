"""Greedy answers, in batches, to the natural stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ..editing.prompts import encode_prompt, stop_token
from ..errors import ConfigError
from .decoding import Taken, Written, decode_greedily
from .scoring import length_batches, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Answer(NamedTuple):
    """A generated text and the route it took: -1 for the main memory, else a shard."""

    text: str
    route: int


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Continue every prompt greedily until the model stops or ``max_new_tokens`` are written.

    Prompts are padded on the left. The checkpoint's own generation settings (sampling, penalties)
    are set aside, except its stop tokens.

    Args:
        model: patched or not.
        tokenizer: its tokenizer.
        prompts: texts to continue, none empty.
        chat: put each prompt into the tokenizer's chat template.
        batch_size: prompts run at once.
        max_new_tokens: the longest answer, in tokens.
        progress: called with the number of prompts done.

    Raises:
        ConfigError: ``batch_size`` or ``max_new_tokens`` is not positive, or there is no chat
            template.
        DataError: a prompt is empty.
    """
    rows = [encode_prompt(tokenizer, prompt, chat) for prompt in prompts]
    written = write_answers(
        model,
        tokenizer,
        rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    return [Answer(text_of(tokenizer, tokens), taken.route) for tokens, taken in written]


@torch.no_grad()
def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    *,
    routes: Sequence[Taken] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Written]:
    """What :func:`generate_answers` does, from token ids to token ids.

    Args:
        model: patched or not.
        tokenizer: its tokenizer.
        rows: prompt ids, none empty.
        routes: where the rows go, one a row; None lets the model decide.
        batch_size: rows run at once; rows of similar length share a batch.
        max_new_tokens: the longest answer, in tokens.
        progress: called with the number of rows done.

    Raises:
        ConfigError: ``batch_size`` or ``max_new_tokens`` is not positive.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ConfigError("batch size and max_new_tokens must be at least 1")
    answers: dict[int, Written] = {}
    with _plain_greedy(model, tokenizer, max_new_tokens) as (pad_id, stop_ids):
        for batch in length_batches([len(row) for row in rows], batch_size):
            ids, mask = pad([rows[i] for i in batch], model, left=True, pad_id=pad_id)
            chosen = None if routes is None else [routes[i] for i in batch]
            found = decode_greedily(model, ids, mask, stop_ids, max_new_tokens, chosen)
            answers.update(zip(batch, found, strict=True))
            if progress is not None:
                progress(len(batch))
    return [answers[i] for i in range(len(rows))]


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(
        tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config
    stops = own.eos_token_id if own is not None else None
    known = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return frozenset({stop_token(tokenizer), *known})


@contextmanager
def _plain_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[tuple[int, frozenset[int]]]:
    """Greedy settings for ``model.generate`` while the block runs.

    Yields the pad token and the stop tokens.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    stop_ids = stop_tokens(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = stop_token(tokenizer)
    # the whole config is replaced: generate() would fill gaps in a smaller one from the model's
    plain = cast(Any, GenerationConfig)(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=pad_id,
        bos_token_id=getattr(own, "bos_token_id", None),
    )
    model.generation_config = plain
    try:
        yield int(pad_id), stop_ids
    finally:
        model.generation_config = own
