"""Where a long answer is cut into chunks (AnyEdit, arXiv 2502.05628, Sec. 4).

An answer is tokenised once, behind its prompt, and everything here speaks of places in that one
sequence: no boundary can slip. The key token of a chunk is the one just before it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from wise_ext.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A sentence of fewer tokens is joined with the next.
_TINY = 4
# What prose has little of: a line with more of it is code or mathematics.
_SIGNS = re.compile(r"[=<>{}\[\]\\^_|;#*/+~`@$%&]|\(\)|::|->|:$")
_INDENTED = re.compile(r"^(\t| {2,})\S")
_FEW_SIGNS = 0.04


class Chunk(NamedTuple):
    """Tokens ``begin`` to ``end - 1`` of an answer, counted from its first."""

    begin: int
    end: int


def windows(length: int, size: int, overlap: int = 0) -> list[Chunk]:
    """Windows of ``size`` tokens, each beginning ``overlap`` tokens before the last one's end.

    Args:
        length: tokens of the answer, at least 1.
        size: at least 1.
        overlap: tokens that two windows share, fewer than ``size``.
    """
    chunks = [Chunk(0, min(size, length))]
    while chunks[-1].end < length:
        begin = chunks[-1].end - overlap
        chunks.append(Chunk(begin, min(begin + size, length)))
    return chunks


def sentences(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], size: int, language: str = "en"
) -> list[Chunk]:
    """The sentences of an answer, of code and mathematics the lines.

    Those of more than ``size`` tokens are cut into equal parts, tiny ones joined with the next.

    Args:
        tokenizer: the model's tokenizer.
        ids: the answer, at least one token.
        size: the longest chunk.
        language: ISO code of the language (of about 300).

    Raises:
        ConfigError: the splitter is not installed.
    """
    text, starts = _text_and_starts(tokenizer, ids)
    begins = sorted({_token_at(starts, place) for place in _sentence_starts(text, language)} | {0})
    kept = [0]
    for begin in begins[1:]:
        if begin - kept[-1] >= _TINY:
            kept.append(begin)
    if len(kept) > 1 and len(ids) - kept[-1] < _TINY:
        kept.pop()
    chunks = []
    for begin, end in zip(kept, [*kept[1:], len(ids)], strict=True):
        chunks += _parts(begin, end, size)
    return chunks


def _parts(begin: int, end: int, size: int) -> list[Chunk]:
    """As few parts of at most ``size`` tokens as will do, of about one length: a window that ends
    with a sentence would often hold no more than its full stop."""
    count = -(-(end - begin) // size)
    cuts = [begin + (end - begin) * i // count for i in range(count + 1)]
    return [Chunk(*ends) for ends in pairwise(cuts)]


def _sentence_starts(text: str, language: str) -> list[int]:
    """Places in a text where a sentence, or a line of code or mathematics, begins."""
    segment = _splitter()
    starts, place = [], 0
    for line in text.splitlines(keepends=True):
        # The splitter gives back the whole line in pieces.
        for sentence in segment(language, line) if _is_prose(line) else [line]:
            if sentence.strip():
                starts.append(place)
            place += len(sentence)
    return starts


def _is_prose(line: str) -> bool:
    return not _INDENTED.match(line) and len(_SIGNS.findall(line)) <= _FEW_SIGNS * len(line)


def _text_and_starts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[str, list[int]]:
    """The text that tokens read as, and where in it each of them begins: of those that make a
    character together, where the first one does."""

    def read(begin: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[begin:end]), clean_up_tokenization_spaces=False))

    starts, text = [], ""
    # Tokens before ``done`` are in the text; from ``anchor`` on they say how what follows reads.
    anchor = done = 0
    for end in range(1, len(ids) + 1):
        starts.append(len(text))
        longer = read(anchor, end)
        # Half a character reads as a sign of its own until the next token completes it.
        if not longer.endswith("\ufffd") or end == len(ids):
            text += longer[len(read(anchor, done)) :]
            anchor, done = done, end
    return text, starts


def _token_at(starts: Sequence[int], place: int) -> int:
    """The first token of the character at ``place``."""
    return bisect_left(starts, starts[bisect_right(starts, place) - 1])


def _splitter() -> Callable[[str, str], list[str]]:
    """What cuts a text of a language, both given, into sentences."""
    try:
        from sentencex import segment
    except ImportError:
        raise ConfigError(
            "cutting answers into sentences needs sentencex: pip install 'wise-ext[longform]', or "
            "choose chunks='needed' or 'windows'"
        ) from None
    split: Callable[[str, str], list[str]] = segment
    return split
