"""How prompts and targets become token ids: one convention for editing, scoring and generating.

A sequence is ``prompt ids + target ids + [stop]``. The two parts are tokenised apart and put
together as ids, so the prompt's tokens are the same while editing, scoring and generating.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt, with the special tokens the model wants in front.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the text to continue.
        chat: put the prompt as the user's message into the tokenizer's chat template, up to where
            the answer begins.

    Raises:
        ConfigError: ``chat`` without a chat template.
        DataError: the prompt becomes no token at all.
    """
    ids = _ids(tokenizer, _as_read(tokenizer, prompt, chat), special=not chat)
    # some tokenizers close every text with the stop token: the answer could never follow it
    closed = not chat and ids and ids[-1] == tokenizer.eos_token_id
    if closed and ids != _ids(tokenizer, prompt, special=False):
        ids = ids[:-1]
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no tokens: write a prompt")
    return ids


def subject_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str | None, chat: bool = False
) -> list[bool] | None:
    """Which of a prompt's tokens name its subject, in any case.

    Args:
        tokenizer, prompt, chat: as for ``encode_prompt``, whose tokens these are.
        subject: what the prompt is about, if known.

    Returns:
        One flag a token; None where the prompt does not name the subject, or the tokenizer (a slow
        one) cannot say where its tokens come from.
    """
    text = _as_read(tokenizer, prompt, chat)
    named = mentions(text, subject)
    if not named or not tokenizer.is_fast:
        return None
    encoded = tokenizer(
        text, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False
    )
    spans = encoded["offset_mapping"][: len(encode_prompt(tokenizer, prompt, chat))]
    return [any(a < end and b > start for start, end in named) for a, b in spans]


def mentions(text: str, subject: str | None) -> list[tuple[int, int]]:
    """Where a text names a subject, in any case: the beginning and the end of each place."""
    name = (subject or "").strip()
    found = re.finditer(re.escape(name), text, re.IGNORECASE) if name else ()
    return [match.span() for match in found]


def encode_target(
    tokenizer: PreTrainedTokenizerBase, target: str, stop: bool = True, chat: bool = False
) -> list[int]:
    """Token ids of an answer as it follows a prompt, without special tokens.

    Args:
        tokenizer: the model's tokenizer.
        target: the answer.
        stop: end with the stop token.
        chat: the prompt came through the chat template, after which an answer has no space.

    Raises:
        DataError: the target becomes no token at all.
        ModelError: ``stop`` and the tokenizer has no end-of-text token.
    """
    target = target.strip()
    ids = _ids(tokenizer, target if chat else " " + target, special=False)
    if not chat:
        # SentencePiece puts a space of its own in front, which would make two
        bare = _ids(tokenizer, target, special=False)
        if bare != ids and _reads(tokenizer, bare, target) and not _reads(tokenizer, ids, target):
            ids = bare
    if not target or not ids:
        raise DataError(f"the target {target!r} has no tokens: write an answer")
    return [*ids, stop_token(tokenizer)] if stop else ids


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts can be put into a chat template at all."""
    return bool(getattr(tokenizer, "chat_template", None))


def stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer. Raises :class:`ModelError` where the tokenizer has none."""
    stop = tokenizer.eos_token_id
    if not isinstance(stop, int):
        raise ModelError("this tokenizer has no end-of-text token: set tokenizer.eos_token")
    return stop


@cache
def neutral_prompts() -> tuple[str, ...]:
    """Short texts about nothing in particular, of many kinds (written for this project).

    They stand in for locality prompts where the edits bring none, and tell a router what
    everything else looks like.
    """
    text = resources.files("wise_ext").joinpath("data/neutral.jsonl").read_text("utf-8")
    return tuple(json.loads(line)["text"] for line in text.split("\n") if line)


def _as_read(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> str:
    """The text that the model reads."""
    if not chat:
        return prompt
    if not has_chat_template(tokenizer):
        raise ConfigError(
            "this model's tokenizer has no chat template: leave chat off, "
            "or choose a chat (instruct) model"
        )
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    # verbose=False: a long prompt is no reason for a warning
    return [int(i) for i in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


def _reads(tokenizer: PreTrainedTokenizerBase, ids: list[int], target: str) -> bool:
    """Whether ``ids`` behind another word read as one space and ``target``."""
    anchor = _ids(tokenizer, "a", special=False)
    text = tokenizer.decode(anchor + ids, clean_up_tokenization_spaces=False)
    return str(text) == f"a {target}"
