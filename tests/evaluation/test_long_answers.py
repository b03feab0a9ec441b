"""What is written, what is only read, and what is not asked again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.evaluation.facts import EDITS, KNOWN, UNRELATED, measured, written
from wise_ext.editing.prompts import encode_prompt, neutral_prompts
from wise_ext.evaluation import long_answers
from wise_ext.evaluation.long_answers import unrelated_prompts
from wise_ext.models import disabled


def test_what_main_memory_said_is_not_generated_again(
    patched: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    original = long_answers.write_answers

    def write(model: Any, tokenizer: Any, rows: Any, **options: Any) -> Any:
        asked.extend(rows)
        return original(model, tokenizer, rows, **options)

    def times(text: str) -> int:
        prompt = encode_prompt(tokenizer, text)
        return sum(row[: len(prompt)] == prompt for row in asked)

    monkeypatch.setattr(long_answers, "write_answers", write)
    measured(patched, tokenizer)
    assert [times(text) for text in KNOWN[:3]] == [2, 2, 2]
    assert times(EDITS[1].prompt) == 1
    assert len(asked) == 5 + 3 + 3 + len(UNRELATED)  # questions, parts, again without memory


def test_an_answer_as_expected_is_read_not_written(
    patched: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said does not depend on what is expected, but how much is written does."""
    model, room = patched, 24
    prompts = [encode_prompt(tokenizer, text) for text in [*KNOWN, EDITS[1].prompt]]
    said = [written(model, tokenizer, text, room) for text in [*KNOWN, EDITS[1].prompt]]
    passes: list[int] = []
    original = long_answers.write_answers

    def write(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        passes.append(sum(len(row.tokens) for row in found))
        return found

    monkeypatch.setattr(long_answers, "write_answers", write)
    asker = long_answers.Asker(model, tokenizer, False, 3, None, True, lambda n: None)
    wrong = (tokenizer.eos_token_id or 0) + 1

    def ask(drafts: list[list[int]]) -> int:
        passes.clear()
        pairs = zip(prompts, drafts, strict=True)
        asked = {i: long_answers.Question(p, room, d[:room]) for i, (p, d) in enumerate(pairs)}
        found = asker.answers(asked)
        assert [found[i].tokens for i in asked] == said
        assert [found[i].taken for i in asked] == asker.routes(prompts)
        return sum(passes)

    whole = sum(map(len, said))
    assert ask([[] for _ in said]) == whole
    assert ask(said) == 0
    assert ask([[*answer, wrong] for answer in said]) == 0
    assert ask([answer[:5] for answer in said]) == whole - sum(min(len(a), 5) for a in said)
    for n in (0, 1, 7, 8, 9, 12):
        # the wrong token is read, and the right one in its place
        read = sum(min(n + 1, len(answer)) for answer in said)
        other = [answer[n] + 1 if n < len(answer) else wrong for answer in said]
        spoilt = [[*a[:n], b, *a[n + 1 :]] for a, b in zip(said, other, strict=True)]
        assert ask(spoilt) == whole - read


def test_without_one_pass_all_is_written(patched: Any, tokenizer: Any) -> None:
    report = measured(patched, tokenizer)
    apart = measured(patched, tokenizer, one_pass=False)
    for key in report.keys() - {"seconds", "locality"}:
        assert apart[key] == report[key], key
    hits = tokens = 0
    for text in UNRELATED:
        now = written(patched, tokenizer, text, 32)
        with disabled(patched):
            before = written(patched, tokenizer, text, 32)
        hits += sum(a == b for a, b in zip(now, before, strict=False))
        tokens += len(before)
    assert apart["locality"] == pytest.approx(hits / tokens)


def test_unrelated_prompts_are_many_and_new() -> None:
    prompts = unrelated_prompts()
    folded = {" ".join(text.casefold().split()) for text in prompts}
    assert len(prompts) == len(folded) == 60
    assert not folded & {" ".join(text.casefold().split()) for text in neutral_prompts()}
    assert all(text.strip() for text in prompts)
