"""Measuring edits whose targets are long: free text, code, reasoning.

The measures are those of the literature on unstructured editing (UnKE, arXiv 2405.15349; AnyEdit,
arXiv 2502.05628): what is generated, beside the target, in words and in meaning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import models
from ..editing.edits import Edit, find_conflicts
from ..editing.progress import ProgressCallback, counted
from ..errors import ConfigError, DataError
from .decoding import Taken, Written
from .long_answers import UNRELATED_TOKENS, Asker, Question, unrelated_prompts
from .metrics import contains, mean
from .text_metrics import Pair, require_longform, rouge_l, score_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
#: which edit, and which of its questions
Key = tuple[int, str]

_ASKED = ("original", "paraphrase")
_MEASURES = ("rouge_l", "rouge_l_recall", "bleu", "similarity", "exact")
_REFERENCE = ("rouge_l_recall", "bleu_chars", "cosine")


@dataclass(frozen=True)
class LongBaseline:
    """What a model said before it was edited; ``baseline_of`` makes one.

    Attributes:
        unrelated: prompts that no edit is about.
        answers: what it answered, token ids with the stop token, at most 32 a prompt.
        scores: by edit id, the scores of its answers to the ``original`` question and to the
            ``paraphrase``; empty where it was not asked.
    """

    unrelated: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    scores: Mapping[str, Row] = field(default_factory=dict)


def baseline_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    *,
    chat: bool = False,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    similarity: bool = True,
    unrelated: Sequence[str] | None = None,
    progress: bool | ProgressCallback = True,
) -> LongBaseline:
    """What the unedited model says, to compare a model with that was edited in its own weights.

    Args:
        model: not edited yet; a patched one is asked without its memory.
        tokenizer: its tokenizer.
        edits: whose prompts to ask, for ``unedited``; without any that is left out.
        chat, batch_size, max_new_tokens, similarity, unrelated, progress: as for
            ``evaluate_long``.

    Raises:
        ConfigError: a number is not positive, no chat template, a library is not installed.
        DataError: a text has no tokens.
    """
    _check(batch_size, max_new_tokens, similarity)
    prompts = unrelated_prompts() if unrelated is None else tuple(unrelated)
    total = len(prompts) + _count(edits)
    with _evaluating(model), counted("asking the unedited model", total, progress) as tick:
        asker = Asker(model, tokenizer, chat, batch_size, max_new_tokens, True, tick)
        with asker.unedited():
            said = _say(asker, prompts)
            pairs = _pairs(asker, edits, asker.answers(_questions(asker, edits)))
    scores = score_pairs(pairs.values(), similarity=similarity, device=model.device)
    rows = {edit.id: _by_question(i, pairs, scores) for i, edit in enumerate(edits)}
    return LongBaseline(prompts, said, rows)


def evaluate_long(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    *,
    chat: bool = False,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    similarity: bool = True,
    sub_questions: bool = True,
    unrelated: Sequence[str] | None = None,
    unedited: bool = True,
    baseline: LongBaseline | None = None,
    one_pass: bool = True,
    progress: bool | ProgressCallback = True,
    details: bool = False,
) -> dict[str, Any]:
    """Measure edits with long targets by what the edited model writes.

    Answers are generated greedily to their natural stop. ``original`` is the edit's own prompt,
    ``paraphrase`` the same in other words; each figure is a mean over edits.

    * ``n``: how many edits were measured; ``superseded``: how many were left out because a later
      one of ``edits`` has their prompt and another target.
    * ``rouge_l``, ``rouge_l_recall``, ``bleu``, ``similarity``, ``exact``: the answer beside the
      target, see :mod:`.text_metrics`; ``exact`` is the share of answers that are the target as a
      whole (trimmed, case folded, punctuation at the ends stripped).
    * ``sub_question.contains``: share of sub-questions whose answer holds the sub-answer;
      ``sub_question.rouge_l_recall``: mean share of the sub-answer's words that are there in order.
    * ``locality``: share of the unedited model's tokens on unrelated prompts (greedy, at most 32 a
      prompt, the stop token included), all prompts together, that the edited model says greedily,
      too, the true ones before them given.
    * ``routing.edit_to_side``, ``paraphrase_to_side``, ``unrelated_to_main``: share of prompts sent
      there; ``routing.right_shard``, ``right_shard_paraphrase``: share of them sent to the very
      shard that holds the edit, among the edits the memory has.
    * ``unedited``: the same scores of the model without its memory, or of the baseline.
    * ``reference``: ROUGE-L recall, BLEU over characters, and the cosine that is called BERTScore
      there, as AnyEdit's published code measures them; for comparison with its tables only.
    * ``seconds``: wall time.

    A mean that nothing is there for, or that was not asked for, is ``None``: so are ``locality``
    and ``unedited`` of a model without a memory where no baseline is given. The model is left as
    it was.

    Args:
        model: patched, edited in its own weights, or neither.
        tokenizer: its tokenizer.
        edits: what to measure; not empty.
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        max_new_tokens: the longest answer, in tokens; None: 32 more than its target has. Answers
            to sub-questions have as much room as the target.
        similarity: run the sentence model.
        sub_questions: ask the sub-questions.
        unrelated: prompts for ``locality``; None for those of this project.
        unedited: ask the model without its memory too.
        baseline: what the model said before it was edited, where that cannot be asked any more.
        one_pass: a prompt and an answer may be read in one pass, which is much faster than writing
            an answer that is as expected. False for an editor that looks at where a prompt ends
            (GRACE); ``locality`` is then token by token that of what is written.
        progress: a bar on standard error, or a function called with (done, total).
        details: add ``details``, one row an edit: its own scores, answers and routes.

    Raises:
        ConfigError: a number is not positive, there is no chat template, a library is not
            installed, or there are unrelated prompts beside a baseline, which has its own.
        DataError: there are no edits, a text has no tokens, or the baseline does not know an edit.
    """
    if not edits:
        raise DataError("there are no edits to evaluate: give at least one")
    if baseline is not None and unrelated is not None:
        raise ConfigError("a baseline brings its own unrelated prompts: leave unrelated out")
    _check(batch_size, max_new_tokens, similarity)
    start = time.perf_counter()
    superseded = {older for older, _ in find_conflicts(edits)}
    kept = [edit for edit in edits if edit.id not in superseded]
    told = baseline.scores if baseline is not None and unedited else {}
    if told and (unknown := [edit.id for edit in kept if edit.id not in told]):
        raise DataError(f"the baseline does not know edit {unknown[0]!r}: make it of all edits")
    patched = models.is_patched(model)
    asks_plain = unedited and patched and not told
    if baseline is not None:
        prompts = baseline.unrelated
    else:
        prompts = unrelated_prompts() if unrelated is None else tuple(unrelated)
    total = _count(kept) * (1 + asks_plain) + len(prompts) * (1 + patched * (baseline is None))
    total += sum(len(edit.sub_question) for edit in kept) * sub_questions
    with _evaluating(model), counted("evaluating", total, progress) as tick:
        asker = Asker(model, tokenizer, chat, batch_size, max_new_tokens, one_pass, tick)
        questions = _questions(asker, kept)
        written = asker.answers(questions)
        parts = asker.answers(_sub_questions(asker, kept)) if sub_questions else {}
        plain = _without_memory(asker, questions, written) if asks_plain else {}
        locality, routes = _locality(asker, prompts, baseline)
    pairs, before = _pairs(asker, kept, written), _pairs(asker, kept, plain)
    scores = score_pairs(
        [*pairs.values(), *before.values()], similarity=similarity, device=model.device
    )
    rows = []
    for i, edit in enumerate(kept):
        row: Row = {"id": edit.id, "prompt": edit.prompt, "target_new": edit.target_new}
        row |= _by_question(i, pairs, scores)
        _add_routes(row, i, written, _held(model, edit))
        row["sub_questions"] = _sub_rows(asker, edit, i, parts)
        row["unedited"] = _by_question(i, before, scores) if before else told.get(edit.id)
        rows.append(row)
    report = _report(rows, locality, routes)
    report["superseded"] = len(edits) - len(kept)
    report["seconds"] = time.perf_counter() - start
    if details:
        report["details"] = rows
    return report


def _check(batch_size: int, max_new_tokens: int | None, similarity: bool) -> None:
    if batch_size < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise ConfigError("batch size and max_new_tokens must be at least 1")
    require_longform(similarity)  # before hours of generating


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


def _count(edits: Sequence[Edit]) -> int:
    return len(edits) + sum(edit.rephrase_prompt is not None for edit in edits)


def _questions(asker: Asker, edits: Sequence[Edit]) -> dict[Key, Question]:
    return {
        (i, name): asker.question(prompt, edit.target_new)
        for i, edit in enumerate(edits)
        for name, prompt in zip(_ASKED, (edit.prompt, edit.rephrase_prompt), strict=True)
        if prompt is not None
    }


def _sub_questions(asker: Asker, edits: Sequence[Edit]) -> dict[tuple[int, int], Question]:
    return {
        (i, part): asker.question(prompt, edit.target_new, edit.sub_answer[part])
        for i, edit in enumerate(edits)
        for part, prompt in enumerate(edit.sub_question)
    }


def _without_memory(
    asker: Asker, questions: Mapping[Key, Question], written: Mapping[Key, Written]
) -> dict[Key, Written]:
    """The unedited model's answers: main memory is that model, bit for bit, and has given its."""
    aside = {key: q for key, q in questions.items() if written[key].taken.route >= 0}
    asker.tick(len(questions) - len(aside))
    with asker.unedited():
        return {**written, **asker.answers(aside)}


def _say(asker: Asker, prompts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    questions = {
        n: Question(asker.prompt(text), UNRELATED_TOKENS) for n, text in enumerate(prompts)
    }
    answers = asker.answers(questions)
    return tuple(tuple(answers[n].tokens) for n in questions)


def _locality(
    asker: Asker, prompts: Sequence[str], baseline: LongBaseline | None
) -> tuple[float | None, list[Taken]]:
    """The share of tokens that are still said, and where the prompts go."""
    encoded = [asker.prompt(text) for text in prompts]
    routes = asker.routes(encoded)
    if baseline is not None:
        said, run = baseline.answers, list(range(len(prompts)))
    elif models.is_patched(asker.model):
        with asker.unedited():
            said = _say(asker, prompts)
        # Main memory is the unedited model, bit for bit.
        run = [n for n, taken in enumerate(routes) if taken.route >= 0]
    else:
        asker.tick(len(prompts))
        return None, routes
    asker.tick(len(prompts) - len(run))
    hits = asker.agreement(
        [encoded[n] for n in run], [said[n] for n in run], [routes[n] for n in run]
    )
    tokens = sum(map(len, said))
    missed = sum(len(said[n]) for n in run) - sum(hits)
    return (1 - missed / tokens if tokens else None), routes


def _pairs(asker: Asker, edits: Sequence[Edit], written: Mapping[Key, Written]) -> dict[Key, Pair]:
    return {key: (asker.text(found), edits[key[0]].target_new) for key, found in written.items()}


def _by_question(i: int, pairs: Mapping[Key, Pair], scores: Mapping[Pair, Row]) -> Row:
    """An edit's answers with their scores; None for a question that it has not."""
    row: Row = dict.fromkeys(_ASKED)
    for name in _ASKED:
        if (pair := pairs.get((i, name))) is not None:
            row[name] = {"answer": pair[0], **scores[pair]}
    return row


def _held(model: PreTrainedModel, edit: Edit) -> int | None:
    """The shard that holds an edit, if one does."""
    return models.current_memory(model).shard_of(edit.id) if models.is_patched(model) else None


def _add_routes(row: Row, i: int, written: Mapping[Key, Written], held: int | None) -> None:
    for name in _ASKED:
        if (found := written.get((i, name))) is not None:
            route = found.taken.route
            row[name] |= {"route": route, "right_shard": None if held is None else route == held}


def _sub_rows(
    asker: Asker, edit: Edit, i: int, written: Mapping[tuple[int, int], Written]
) -> list[Row]:
    rows: list[Row] = []
    for part, (question, expected) in enumerate(
        zip(edit.sub_question, edit.sub_answer, strict=True)
    ):
        if (found := written.get((i, part))) is not None:
            answer = asker.text(found)
            rows.append(
                {
                    "question": question,
                    "sub_answer": expected,
                    "answer": answer,
                    "contains": contains(answer, expected),
                    "rouge_l_recall": rouge_l(answer, expected).recall,
                    "route": found.taken.route,
                }
            )
    return rows


def _report(rows: Sequence[Row], locality: float | None, routes: Sequence[Taken]) -> Row:
    parts = [part for row in rows for part in row["sub_questions"]]
    before = [row["unedited"] for row in rows if row["unedited"] is not None]
    right = _means(rows, "right_shard")
    to_side = {
        name: mean(None if row[name] is None else row[name]["route"] >= 0 for row in rows)
        for name in _ASKED
    }
    return {
        "n": len(rows),
        **{key: _means(rows, key) for key in _MEASURES},
        "sub_question": {
            key: mean(part[key] for part in parts) for key in ("contains", "rouge_l_recall")
        },
        "locality": locality,
        "routing": {
            "edit_to_side": to_side["original"],
            "paraphrase_to_side": to_side["paraphrase"],
            "unrelated_to_main": mean(taken.route < 0 for taken in routes),
            "right_shard": right["original"],
            "right_shard_paraphrase": right["paraphrase"],
        },
        "unedited": {key: _means(before, key) for key in _MEASURES},
        "reference": {key: _means(rows, "reference", key) for key in _REFERENCE},
    }


def _means(rows: Sequence[Row], *path: str) -> dict[str, float | None]:
    """Means over edits of one figure of the answers to each question."""

    def figure(scores: Any) -> Any:
        for key in path:
            scores = scores[key]
        return scores

    return {
        name: mean(None if row[name] is None else figure(row[name]) for row in rows)
        for name in _ASKED
    }
