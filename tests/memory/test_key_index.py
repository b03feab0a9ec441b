"""The key index against a score worked out token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.memory import made_texts as made
from wise_ext.memory import KeyIndex, TokenKeys
from wise_ext.memory.token_keys import WINDOW, last_tokens

Draw = Callable[..., Tensor]


@pytest.mark.parametrize("prompts", [made.PROMPTS, made.NAMED])
def test_scores_match_the_definition(prompts: list[TokenKeys]) -> None:
    index = made.filled(prompts)
    assert index.lengths.tolist() == [5, 6, 1, 4, 13, 16]
    scores = index.prepare().scores(*made.batch(made.QUERIES))
    assert scores.shape == (5, 6)
    wanted = torch.tensor([made.oracle(prompts, made.background(), q) for q in made.QUERIES])
    # Keys are rounded to 1/127 of their largest entry.
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.01)
    score, row = index.nearest(made.QUERIES)
    torch.testing.assert_close(score, wanted.amax(1), rtol=0, atol=0.01)
    assert row.tolist()[:3] == [0, 1, 2]


words = st.lists(st.integers(0, 59), min_size=1, max_size=22)


@given(
    st.lists(words, min_size=1, max_size=6), words, st.sets(st.integers(0, 59)), st.integers(0, 99)
)
def test_scores_match_the_definition_of_any_texts(
    prompts: list[list[int]], query: list[int], names: set[int], seed: int
) -> None:
    stored = [made.text(ids, seed=seed + i, noise=0.3) for i, ids in enumerate(prompts)]
    named = torch.tensor(sorted(names), dtype=torch.int64)
    stored = [text._replace(subject=torch.isin(text.ids, named)) for text in stored]
    asked = made.text(query, seed=seed + 50, noise=0.3)
    scores = made.filled(stored).prepare().scores(*made.batch([asked]))[0]
    wanted = torch.tensor(made.oracle(stored, made.background(), asked))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.01)
    assert scores.ge(0).all() and scores.le(1 + 1e-5).all()


@given(st.lists(words, min_size=1, max_size=6), st.integers(0, 99))
def test_an_edits_own_prompt_scores_one(prompts: list[list[int]], seed: int) -> None:
    stored = [made.text(ids, seed=seed + i, noise=0.3) for i, ids in enumerate(prompts)]
    scores = made.filled(stored).prepare().scores(*made.batch(stored)).diagonal()
    torch.testing.assert_close(scores, torch.ones(len(stored)), rtol=0, atol=2e-3)


@given(st.lists(words, min_size=1, max_size=5), words, words, st.integers(0, 99))
def test_more_text_behind_never_lowers_a_score(
    prompts: list[list[int]], query: list[int], more: list[int], seed: int
) -> None:
    prepared = made.filled(
        [made.text(ids, seed=seed + i) for i, ids in enumerate(prompts)]
    ).prepare()
    asked, rest = made.text(query, seed=50, noise=0.3), made.text(more, seed=51, noise=0.3)
    both = TokenKeys(*(torch.cat(pair) for pair in zip(asked[:2], rest[:2], strict=True)))
    alone, longer = (prepared.scores(*made.batch([q])) for q in (asked, both))
    assert longer.ge(alone - 1e-5).all()


def test_a_word_is_known_best_behind_the_same_word() -> None:
    index = made.filled([made.text([31, 40])])
    phrase, turned, apart = (
        index.nearest([made.text(ids)])[0].item() for ids in ([9, 31, 40], [40, 31], [31, 9, 40])
    )
    assert phrase > turned + 0.02 and phrase > apart + 0.02
    assert min(turned, apart) > 0.7


def test_an_edit_is_found_behind_a_long_text() -> None:
    index = made.filled(made.PROMPTS)
    rest = [4 + i % 26 for i in range(50)]
    for edit in (0, 1, 2, 4):
        own = made.PROMPTS[edit].ids.tolist()
        query = made.text([*rest, *own, 1, 0], seed=20 + edit, noise=0.1)
        score, row = index.nearest([query])
        assert row.item() == edit
        # A prompt's first word has another before it here.
        assert score.item() > 0.85
    # Nothing but the rest belongs to no edit.
    assert index.nearest([made.text(rest, seed=30, noise=0.1)])[0].item() < 0.6


def test_a_rare_word_counts_and_the_wording_hardly_does() -> None:
    # The question is the same, the name is not; and the other way about.
    index = made.filled([made.text([0, 31, 1])])
    same_wording = index.nearest([made.text([0, 32, 1])])[0].item()
    same_name = index.nearest([made.text([9, 31, 12, 14])])[0].item()
    assert same_wording < 0.4 < 0.6 < same_name


def test_words_that_many_edits_share_stop_telling_them_apart() -> None:
    alone = made.filled([made.text([31, 40])])
    crowd = made.filled([made.text([31, 40 + i]) for i in range(12)])
    query = made.text([31, 5])
    assert (
        crowd.prepare().scores(*made.batch([query]))[0, 0] < alone.nearest([query])[0].item() - 0.1
    )


def test_the_background_says_what_is_common_and_is_never_matched() -> None:
    common = [made.text([31, 4 + i], seed=i) for i in range(8)]
    knowing = made.filled([made.text([31, 40])], background=[*made.background(), *common])
    query = [made.text([31, 5])]
    assert (
        knowing.nearest(query)[0].item()
        < made.filled([made.text([31, 40])]).nearest(query)[0].item()
    )
    assert knowing.texts == 20
    assert len(knowing) == 1
    assert knowing.nearest(common)[1].tolist() == [0] * 8
    # A word counts once a text.
    assert dict(knowing.common.tolist())[31] == 8
    assert dict(made.filled(made.PROMPTS).common.tolist())[0] == 12


def test_rows_stand_alone_and_pads_count_for_nothing() -> None:
    prepared = made.filled(made.PROMPTS).prepare()
    together = prepared.scores(*made.batch(made.QUERIES, pad=math.nan))
    assert together.isfinite().all()
    assert together.equal(prepared.scores(*made.batch(made.QUERIES, pad=1e30)))
    for i, query in enumerate(made.QUERIES):
        real = torch.ones(1, len(query.ids), dtype=torch.bool)
        alone = prepared.scores(query.activation.unsqueeze(0), real)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    score, _ = prepared.match(torch.full((1, 2, made.DIM), math.nan), torch.zeros(1, 2).bool())
    assert score.item() == 0.0


def test_a_row_that_overflows_leaves_the_others_alone() -> None:
    prepared = made.filled(made.PROMPTS).prepare()
    activation, real = made.batch(made.QUERIES[:2])
    wanted = prepared.match(activation, real)
    broken = torch.cat([activation, torch.full_like(activation[:1], math.inf)])
    score, row = prepared.match(broken, torch.cat([real, torch.ones_like(real[:1])]))
    torch.testing.assert_close(score[:2], wanted[0])
    assert row[:2].equal(wanted[1])
    assert not score[2] > -1.0


def test_only_the_last_tokens_count() -> None:
    index = made.filled([made.text([31, 32])])
    filler = [4 + i % 20 for i in range(WINDOW - 2)]
    inside, outside = made.text([31, 32, *filler]), made.text([31, 32, *filler, 4, 5])
    assert index.nearest([inside])[0].item() > 0.99
    assert index.nearest([outside])[0].item() < 0.6
    # Of a long prompt, too, its end is stored.
    long = made.filled([made.text([40, *range(4, 30), *filler, 31])])
    assert 40 not in long.tokens.tolist() and 31 in long.tokens.tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=90), st.integers(0, 9))
def test_the_last_real_tokens_wherever_pads_stand(real: list[bool], seed: int) -> None:
    activation = torch.randn(1, len(real), 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([real])
    poisoned = torch.where(mask.unsqueeze(-1), activation, math.nan)
    taken, there = last_tokens(poisoned, mask)
    assert taken.shape == (1, min(len(real), WINDOW), 3)
    wanted = activation[0][mask[0]][-WINDOW:]
    assert sorted(taken[0][there[0]].tolist()) == sorted(wanted.tolist())


def test_more_edits_than_are_compared_at_a_time() -> None:
    prompts = [made.text([30 + i % 30, (i * 7) % 30], seed=i, noise=1.0) for i in range(1200)]
    index = made.filled(prompts)
    wanted = [3, 511, 512, 513, 1199]
    score, row = index.nearest([prompts[i] for i in wanted])
    assert row.tolist() == wanted
    assert score.min().item() > 0.99


def test_of_equally_good_edits_the_latest_wins() -> None:
    prompts = [*made.PROMPTS[:4], made.PROMPTS[1], made.PROMPTS[2]]
    assert made.filled(prompts).nearest([made.PROMPTS[1]])[1].item() == 4
    assert made.filled(prompts[:4]).nearest([made.PROMPTS[1]])[1].item() == 1
    # Fp32 adds up in another order in another batch: that must decide nothing.
    prepared = made.filled(prompts).prepare()
    weights = prepared.weights.clone()
    weights[4] *= 1 - 5e-6
    assert prepared._replace(weights=weights).match(*made.batch([made.PROMPTS[1]]))[1].item() == 4
    weights[4] *= 0.999
    assert prepared._replace(weights=weights).match(*made.batch([made.PROMPTS[1]]))[1].item() == 1


def test_adding_and_removing_is_never_having_been_there() -> None:
    index = made.filled(made.PROMPTS[:3])
    before, state = index.nearest(made.QUERIES), index.state_tensors()
    assert index.prepare() is index.prepare()
    index.add(made.PROMPTS[3:], [3, 3, 3], ["late", "other", "late"])
    assert len(index.prepare().places) == 6
    assert not torch.equal(index.nearest(made.QUERIES)[0], before[0])
    assert index.remove("late") == 2
    assert index.remove("late") == 0
    assert index.remove("other") == 1
    after = index.nearest(made.QUERIES)
    assert after[0].equal(before[0]) and after[1].equal(before[1])
    assert all(index.state_tensors()[name].equal(state[name]) for name in state)
    assert index.ids == ["edit-0", "edit-1", "edit-2"]


def test_adding_one_by_one_is_adding_together() -> None:
    one = KeyIndex(made.DIM, background=made.background())
    for i, prompt in enumerate(made.PROMPTS):
        one.add([prompt], [i], [f"edit-{i}"])
    together = made.filled(made.PROMPTS).state_tensors()
    assert all(one.state_tensors()[name].equal(tensor) for name, tensor in together.items())
    one.add([], [], [])
    assert len(one) == 6


@given(st.permutations(range(6)), st.integers(0, 6))
def test_reordering_takes_the_keys_along(order: list[int], count: int) -> None:
    index = made.filled(made.PROMPTS)
    before = index.prepare().scores(*made.batch(made.QUERIES))
    chosen = order[:count]
    index.reorder([f"edit-{i}" for i in chosen])
    assert index.shards.tolist() == chosen
    again = made.filled([made.PROMPTS[i] for i in chosen]) if chosen else KeyIndex(made.DIM)
    assert index.keys.equal(again.keys) and index.lengths.equal(again.lengths)
    if count == 6:
        after = index.prepare().scores(*made.batch(made.QUERIES))
        torch.testing.assert_close(after, before[:, chosen], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no key of 'edit-9'"):
        index.reorder(["edit-9"])
    assert len(index) == count


def test_renumbering_and_placing_move_and_forget() -> None:
    index = made.filled(made.PROMPTS[:4])
    index.prepare()
    index.renumber([1, -1, 0, 0])
    assert index.shards.tolist() == [1, 0, 0]
    assert index.ids == ["edit-0", "edit-2", "edit-3"]
    assert index.lengths.tolist() == [5, 1, 4] and len(index.keys) == 10
    assert index.prepare().shards.tolist() == [1, 0, 0]
    index.place([2, 1, 5])
    assert index.prepare().shards.tolist() == [2, 1, 5]
    assert index.shards.dtype == torch.int32
    KeyIndex(5).renumber([])
    assert index.nbytes() == 10 * 2 * made.DIM + 10 * (4 + 1) + 3 * (4 + 4 + 8)


def test_what_a_prompt_could_be_taken_for() -> None:
    index = made.filled(made.PROMPTS)
    asked = index.prepare().scores(*made.batch(made.QUERIES[:2]))
    found = index.like(made.QUERIES[:2], 0.5)
    for row, scores in zip(found, asked, strict=True):
        assert {f"edit-{i}" for i in range(6) if scores[i] > 0.5} <= set(row)
    assert index.like(made.QUERIES[:2], 1.0) == [[], []]
    assert KeyIndex(made.DIM).like(made.QUERIES[:1], 0.5) == [[]]
    assert index.like([], 0.5) == [] and len(index) == 6


def test_a_prompt_that_says_less_is_confused_with_one_that_says_more() -> None:
    # The short one scores low for the long one's edit, whose prompt would score 1 for the short's.
    index = KeyIndex(made.DIM)
    index.add([made.text([3, 7, 11, 15, 19, 23, 27, 31, 4, 8])], [0], ["long"])
    short = made.text([3, 7])
    assert index.nearest([short])[0].item() < 0.5
    assert index.like([short], 0.5) == [["long"]]
