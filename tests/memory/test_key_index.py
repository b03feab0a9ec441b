"""The key index against a score worked out token by token in plain Python."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import KeyIndex, TokenKeys
from wise_ext.memory.token_keys import WINDOW, last_tokens, random_signs, standardise

Draw = Callable[..., Tensor]
DIM = 96
# What stands for a word: every token of one id has nearly this activation.
_WORDS = torch.randn(60, DIM, generator=torch.Generator().manual_seed(7)) * 2 + 1


def _text(ids: Sequence[int], seed: int = 0, noise: float = 0.0) -> TokenKeys:
    """A text of these words, each a little different every time it is said."""
    generator = torch.Generator().manual_seed(seed)
    words = _WORDS[list(ids)]
    noisy = words + noise * torch.randn(words.shape, generator=generator)
    return TokenKeys(torch.tensor(list(ids), dtype=torch.int64), noisy)


def _background(seed: int = 0) -> list[TokenKeys]:
    """Texts in which words 0-3 are common and 30-59 never stand."""
    generator = torch.Generator().manual_seed(100 + seed)
    rows = []
    for _ in range(12):
        drawn = torch.randint(4, 30, (5,), generator=generator).tolist()
        rows.append([0, *drawn, 1, 2 + int(drawn[0] > 15)])
    return [_text(row, seed=i, noise=0.3) for i, row in enumerate(rows)]


def _filled(prompts: Sequence[TokenKeys], **options: object) -> KeyIndex:
    options = {"background": _background()} | options
    index = KeyIndex(prompts[0].activation.shape[1], **options)  # type: ignore[arg-type]
    index.add(prompts, list(range(len(prompts))), [f"edit-{i}" for i in range(len(prompts))])
    return index


def _batch(queries: Sequence[TokenKeys], pad: float = 0.0) -> tuple[Tensor, Tensor]:
    """Queries side by side, pads at alternating ends."""
    width = 1 + max(len(q.ids) for q in queries)
    activation = torch.full((len(queries), width, queries[0].activation.shape[1]), pad)
    real = torch.zeros(len(queries), width, dtype=torch.bool)
    for i, query in enumerate(queries):
        start = (width - len(query.ids)) * (i % 2)
        activation[i, start : start + len(query.ids)] = query.activation
        real[i, start : start + len(query.ids)] = True
    return activation, real


def _oracle(
    prompts: Sequence[TokenKeys], background: Sequence[TokenKeys], query: TokenKeys
) -> list[float]:
    """The score of each stored edit for one query, by the definition alone."""
    seen = torch.cat([t.activation for t in background]).double()
    mean, deviation = seen.mean(0), seen.std(0, correction=0)
    floor = 1e-3 * math.sqrt(float((deviation**2).mean()))
    deviation = deviation.clamp(min=floor)

    def keys(text: TokenKeys) -> list[Tensor]:
        """A key is the token and, at half its weight, the token before."""
        made, before = [], torch.zeros_like(mean)
        for activation in text.activation[-64:].double():
            token = (activation - mean) / deviation
            token = token / token.norm()
            made.append(torch.cat([token, before / 2]))
            before = token
        return made

    def cosine(one: Tensor, two: Tensor) -> float:
        return float(one @ two / (one.norm() * two.norm()))

    behind = [set(t.ids.tolist()) for t in background]
    kept: list[list[tuple[int, Tensor]]] = []
    for prompt in prompts:
        tokens = list(zip(prompt.ids.tolist()[-64:], keys(prompt), strict=True))
        by_rarity = sorted(
            range(len(tokens)), key=lambda i, t=tokens: sum(t[i][0] in text for text in behind)
        )
        kept.append([tokens[i] for i in sorted(by_rarity[:16])])
    texts = behind + [{token for token, _ in edit} for edit in kept]

    def rarity(token: int) -> float:
        holding = sum(token in text for text in texts)
        return max(0.02, 1 - math.log(holding) / math.log(max(2, len(texts))))

    asked = keys(query)
    scores = []
    for edit in kept:
        rarest = sorted(range(len(edit)), key=lambda i, e=edit: -rarity(e[i][0]))[:8]
        cubes = {i: rarity(edit[i][0]) ** 3 for i in rarest}
        score = 0.0
        for i in rarest:
            weight = 0.85 * cubes[i] / sum(cubes.values()) + 0.15 / len(rarest)
            best = max(cosine(edit[i][1], key) for key in asked)
            score += weight * max(0.0, best)
        scores.append(score)
    return scores


PROMPTS = [
    _text([0, 31, 32, 5, 1], seed=1, noise=0.2),
    _text([0, 31, 33, 9, 12, 1], seed=2, noise=0.2),
    _text([34], seed=3, noise=0.2),
    _text([0, 0, 2, 1], seed=4, noise=0.2),
    # More words than are compared, and more than are kept.
    _text([0, *range(35, 46), 1], seed=5, noise=0.2),
    _text([0, 1, 2, 3, *range(20, 30), *range(46, 54), 31], seed=6, noise=0.2),
]
QUERIES = [
    _text([0, 31, 32, 5, 1], seed=11, noise=0.4),
    _text([7, 8, 31, 9, 33], seed=12, noise=0.4),
    _text([34, 34, 1], seed=13, noise=0.4),
    _text([4, 6, 10], seed=14, noise=0.4),
    _text(list(range(30, 50)), seed=15, noise=0.4),
]


def test_scores_match_the_definition() -> None:
    index = _filled(PROMPTS)
    assert index.lengths.tolist() == [5, 6, 1, 4, 13, 16]
    scores = index.prepare().scores(*_batch(QUERIES))
    assert scores.shape == (5, 6)
    wanted = torch.tensor([_oracle(PROMPTS, _background(), q) for q in QUERIES])
    # Keys are rounded to 1/127 of their largest entry.
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.01)
    score, row = index.nearest(QUERIES)
    torch.testing.assert_close(score, wanted.amax(1), rtol=0, atol=0.01)
    assert row.tolist()[:3] == [0, 1, 2]


words = st.lists(st.integers(0, 59), min_size=1, max_size=22)


@given(st.lists(words, min_size=1, max_size=6), words, st.integers(0, 99))
def test_scores_match_the_definition_of_any_texts(
    prompts: list[list[int]], query: list[int], seed: int
) -> None:
    stored = [_text(ids, seed=seed + i, noise=0.3) for i, ids in enumerate(prompts)]
    asked = _text(query, seed=seed + 50, noise=0.3)
    scores = _filled(stored).prepare().scores(*_batch([asked]))[0]
    wanted = torch.tensor(_oracle(stored, _background(), asked))
    torch.testing.assert_close(scores, wanted, rtol=0, atol=0.01)
    assert scores.ge(0).all() and scores.le(1 + 1e-5).all()


@given(st.lists(words, min_size=1, max_size=6), st.integers(0, 99))
def test_an_edits_own_prompt_scores_one(prompts: list[list[int]], seed: int) -> None:
    stored = [_text(ids, seed=seed + i, noise=0.3) for i, ids in enumerate(prompts)]
    scores = _filled(stored).prepare().scores(*_batch(stored)).diagonal()
    torch.testing.assert_close(scores, torch.ones(len(stored)), rtol=0, atol=2e-3)


@given(st.lists(words, min_size=1, max_size=5), words, words, st.integers(0, 99))
def test_more_text_behind_never_lowers_a_score(
    prompts: list[list[int]], query: list[int], more: list[int], seed: int
) -> None:
    prepared = _filled([_text(ids, seed=seed + i) for i, ids in enumerate(prompts)]).prepare()
    asked, rest = _text(query, seed=50, noise=0.3), _text(more, seed=51, noise=0.3)
    both = TokenKeys(*(torch.cat(pair) for pair in zip(asked, rest, strict=True)))
    alone, longer = (prepared.scores(*_batch([q])) for q in (asked, both))
    assert longer.ge(alone - 1e-5).all()


def test_a_word_is_known_best_behind_the_same_word() -> None:
    index = _filled([_text([31, 40])])
    phrase, turned, apart = (
        index.nearest([_text(ids)])[0].item() for ids in ([9, 31, 40], [40, 31], [31, 9, 40])
    )
    assert phrase > turned + 0.02 and phrase > apart + 0.02
    assert min(turned, apart) > 0.7


def test_an_edit_is_found_behind_a_long_text() -> None:
    index = _filled(PROMPTS)
    rest = [4 + i % 26 for i in range(50)]
    for edit in (0, 1, 2, 4):
        own = PROMPTS[edit].ids.tolist()
        query = _text([*rest, *own, 1, 0], seed=20 + edit, noise=0.1)
        score, row = index.nearest([query])
        assert row.item() == edit
        # A prompt's first word has another before it here.
        assert score.item() > 0.85
    # Nothing but the rest belongs to no edit.
    assert index.nearest([_text(rest, seed=30, noise=0.1)])[0].item() < 0.6


def test_a_rare_word_counts_and_the_wording_hardly_does() -> None:
    # The question is the same, the name is not; and the other way about.
    index = _filled([_text([0, 31, 1])])
    same_wording = index.nearest([_text([0, 32, 1])])[0].item()
    same_name = index.nearest([_text([9, 31, 12, 14])])[0].item()
    assert same_wording < 0.4 < 0.6 < same_name


def test_words_that_many_edits_share_stop_telling_them_apart() -> None:
    alone = _filled([_text([31, 40])])
    crowd = _filled([_text([31, 40 + i]) for i in range(12)])
    query = _text([31, 5])
    assert crowd.prepare().scores(*_batch([query]))[0, 0] < alone.nearest([query])[0].item() - 0.1


def test_the_background_says_what_is_common_and_is_never_matched() -> None:
    common = [_text([31, 4 + i], seed=i) for i in range(8)]
    knowing = _filled([_text([31, 40])], background=[*_background(), *common])
    query = [_text([31, 5])]
    assert knowing.nearest(query)[0].item() < _filled([_text([31, 40])]).nearest(query)[0].item()
    assert knowing.texts == 20
    assert len(knowing) == 1
    assert knowing.nearest(common)[1].tolist() == [0] * 8
    # A word counts once a text.
    assert dict(knowing.common.tolist())[31] == 8
    assert dict(_filled(PROMPTS).common.tolist())[0] == 12


def test_rows_stand_alone_and_pads_count_for_nothing() -> None:
    prepared = _filled(PROMPTS).prepare()
    together = prepared.scores(*_batch(QUERIES, pad=math.nan))
    assert together.isfinite().all()
    assert together.equal(prepared.scores(*_batch(QUERIES, pad=1e30)))
    for i, query in enumerate(QUERIES):
        real = torch.ones(1, len(query.ids), dtype=torch.bool)
        alone = prepared.scores(query.activation.unsqueeze(0), real)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    score, _ = prepared.match(torch.full((1, 2, DIM), math.nan), torch.zeros(1, 2).bool())
    assert score.item() == 0.0


def test_a_row_that_overflows_leaves_the_others_alone() -> None:
    prepared = _filled(PROMPTS).prepare()
    activation, real = _batch(QUERIES[:2])
    wanted = prepared.match(activation, real)
    broken = torch.cat([activation, torch.full_like(activation[:1], math.inf)])
    score, row = prepared.match(broken, torch.cat([real, torch.ones_like(real[:1])]))
    torch.testing.assert_close(score[:2], wanted[0])
    assert row[:2].equal(wanted[1])
    assert not score[2] > -1.0


def test_only_the_last_tokens_count() -> None:
    index = _filled([_text([31, 32])])
    filler = [4 + i % 20 for i in range(WINDOW - 2)]
    inside, outside = _text([31, 32, *filler]), _text([31, 32, *filler, 4, 5])
    assert index.nearest([inside])[0].item() > 0.99
    assert index.nearest([outside])[0].item() < 0.6
    # Of a long prompt, too, its end is stored.
    long = _filled([_text([40, *range(4, 30), *filler, 31])])
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
    prompts = [_text([30 + i % 30, (i * 7) % 30], seed=i, noise=1.0) for i in range(1200)]
    index = _filled(prompts)
    wanted = [3, 511, 512, 513, 1199]
    score, row = index.nearest([prompts[i] for i in wanted])
    assert row.tolist() == wanted
    assert score.min().item() > 0.99


def test_of_equally_good_edits_the_latest_wins() -> None:
    prompts = [*PROMPTS[:4], PROMPTS[1], PROMPTS[2]]
    assert _filled(prompts).nearest([PROMPTS[1]])[1].item() == 4
    assert _filled(prompts[:4]).nearest([PROMPTS[1]])[1].item() == 1
    # Fp32 adds up in another order in another batch: that must decide nothing.
    prepared = _filled(prompts).prepare()
    weights = prepared.weights.clone()
    weights[4] *= 1 - 5e-6
    assert prepared._replace(weights=weights).match(*_batch([PROMPTS[1]]))[1].item() == 4
    weights[4] *= 0.999
    assert prepared._replace(weights=weights).match(*_batch([PROMPTS[1]]))[1].item() == 1


def test_adding_and_removing_is_never_having_been_there() -> None:
    index = _filled(PROMPTS[:3])
    before, state = index.nearest(QUERIES), index.state_tensors()
    assert index.prepare() is index.prepare()
    index.add(PROMPTS[3:], [3, 3, 3], ["late", "other", "late"])
    assert len(index.prepare().keys) == 6
    assert not torch.equal(index.nearest(QUERIES)[0], before[0])
    assert index.remove("late") == 2
    assert index.remove("late") == 0
    assert index.remove("other") == 1
    after = index.nearest(QUERIES)
    assert after[0].equal(before[0]) and after[1].equal(before[1])
    assert all(index.state_tensors()[name].equal(state[name]) for name in state)
    assert index.ids == ["edit-0", "edit-1", "edit-2"]


def test_adding_one_by_one_is_adding_together() -> None:
    one = KeyIndex(DIM, background=_background())
    for i, prompt in enumerate(PROMPTS):
        one.add([prompt], [i], [f"edit-{i}"])
    together = _filled(PROMPTS).state_tensors()
    assert all(one.state_tensors()[name].equal(tensor) for name, tensor in together.items())
    one.add([], [], [])
    assert len(one) == 6


@given(st.permutations(range(6)), st.integers(0, 6))
def test_reordering_takes_the_keys_along(order: list[int], count: int) -> None:
    index = _filled(PROMPTS)
    before = index.prepare().scores(*_batch(QUERIES))
    chosen = order[:count]
    index.reorder([f"edit-{i}" for i in chosen])
    assert index.shards.tolist() == chosen
    again = _filled([PROMPTS[i] for i in chosen]) if chosen else KeyIndex(DIM)
    assert index.keys.equal(again.keys) and index.lengths.equal(again.lengths)
    if count == 6:
        after = index.prepare().scores(*_batch(QUERIES))
        torch.testing.assert_close(after, before[:, chosen], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no key of 'edit-9'"):
        index.reorder(["edit-9"])
    assert len(index) == count


def test_renumbering_and_placing_move_and_forget() -> None:
    index = _filled(PROMPTS[:4])
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
    assert index.nbytes() == 10 * 2 * DIM + 10 * 4 + 3 * 4 + 3 * 4


def test_what_a_prompt_could_be_taken_for() -> None:
    index = _filled(PROMPTS)
    asked = index.prepare().scores(*_batch(QUERIES[:2]))
    found = index.like(QUERIES[:2], 0.5)
    for row, scores in zip(found, asked, strict=True):
        assert {f"edit-{i}" for i in range(6) if scores[i] > 0.5} <= set(row)
    assert index.like(QUERIES[:2], 1.0) == [[], []]
    assert KeyIndex(DIM).like(QUERIES[:1], 0.5) == [[]]
    assert index.like([], 0.5) == [] and len(index) == 6


def test_a_prompt_that_says_less_is_confused_with_one_that_says_more() -> None:
    # The short one scores low for the long one's edit, whose prompt would score 1 for the short's.
    index = KeyIndex(DIM)
    index.add([_text([3, 7, 11, 15, 19, 23, 27, 31, 4, 8])], [0], ["long"])
    short = _text([3, 7])
    assert index.nearest([short])[0].item() < 0.5
    assert index.like([short], 0.5) == [["long"]]


def test_projection_shortens_keys_and_keeps_their_neighbours(draw: Draw) -> None:
    ids = torch.arange(40)
    prompts = [TokenKeys(ids[i : i + 1], draw(1, 400, seed=i)) for i in range(40)]
    near = [TokenKeys(p.ids, p.activation + 0.2 * draw(1, 400, seed=99)) for p in prompts]
    index = _filled(prompts, width=128, seed=3, background=())
    assert index.keys.shape == (40, 128) and index.width == 128
    assert index.nearest(near)[1].tolist() == list(range(40))
    assert _filled(prompts, width=128, seed=3, background=()).keys.equal(index.keys)
    assert not _filled(prompts, width=128, seed=4, background=()).keys.equal(index.keys)
    signs = random_signs(400, 128, 3)
    assert signs.abs().sub(128**-0.5).abs().max() < 1e-6
    assert abs(float(signs.sign().mean())) < 0.02
    assert random_signs(40, 40, 0).shape == (40, 0)


def test_standardising(draw: Draw) -> None:
    x = draw(50, 4) * torch.tensor([1.0, 20.0, 1e-9, 0.0]) + torch.tensor([5.0, 0.0, 3.0, 1.0])
    mean, scale = standardise(x)
    done = (x - mean) * scale
    torch.testing.assert_close(done[:, :2].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(done.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    # What hardly varies is not blown up.
    assert done[:, 2:].abs().max() < 1e-2
    for too_few in (x[:0], x[:1]):
        mean, scale = standardise(too_few)
        assert mean.equal(torch.zeros(4)) and scale.equal(torch.ones(4))
    mean, scale = standardise(x[:1].repeat(3, 1))
    torch.testing.assert_close(mean, x[0])
    assert scale.equal(torch.ones(4))


@pytest.mark.parametrize("width", [512, 7])
def test_state_round_trip(width: int) -> None:
    index = _filled(PROMPTS, width=width, seed=5)
    meta = json.loads(json.dumps(index.state_meta()))
    again = KeyIndex.from_state({n: t.clone() for n, t in index.state_tensors().items()}, meta)
    assert again.state_meta() == index.state_meta()
    for name, tensor in index.state_tensors().items():
        assert again.state_tensors()[name].equal(tensor)
    wanted, got = index.nearest(QUERIES), again.nearest(QUERIES)
    assert got[0].equal(wanted[0]) and got[1].equal(wanted[1])
    # It goes on as the first would.
    for each in (index, again):
        each.add(PROMPTS[:1], [9], ["more"])
    assert again.keys.equal(index.keys) and again.nearest(QUERIES)[0].equal(
        index.nearest(QUERIES)[0]
    )


def test_an_empty_index_makes_the_round_trip() -> None:
    index = KeyIndex(DIM)
    again = KeyIndex.from_state(index.state_tensors(), index.state_meta())
    assert len(again) == 0 and again.state_meta() == index.state_meta()


def test_state_that_does_not_fit() -> None:
    index = _filled(PROMPTS[:3])
    tensors, meta = index.state_tensors(), index.state_meta()

    def refused(match: str, meta_changes: dict[str, object] | None = None, **changes: Tensor):
        with pytest.raises(ValueError, match=match):
            KeyIndex.from_state(tensors | changes, meta | (meta_changes or {}))

    int32 = torch.int32
    refused(r"keys must be torch.int8 \[12, 192\]", keys=tensors["keys"][:, 1:])
    refused(r"keys must be torch.int8 \[12, 192\]", keys=tensors["keys"].float())
    refused("keys must be", keys=torch.tensor(3, dtype=torch.int8))
    refused(r"mean must be torch.float32 \[96\]", mean=tensors["mean"][1:])
    refused(r"scale must be torch.float32 \[96\]", scale=tensors["scale"].double())
    refused(r"common must be torch.int64 \[\d+, 2\]", common=tensors["common"][:, :1])
    refused("common must be", common=torch.tensor(3))
    refused(r"tokens must be torch.int32 \[12\]", tokens=tensors["tokens"][1:])
    refused(r"lengths must be torch.int32 \[3\]", lengths=tensors["lengths"][1:])
    refused(r"shards must be torch.int32 \[3\]", shards=tensors["shards"].long())
    refused(r"lengths must be torch.int32 \[2\]", {"ids": ["a", "b"]})
    refused("do not add up to 12 keys", lengths=torch.tensor([5, 6, 2], dtype=int32))
    refused("do not add up to 12 keys", lengths=torch.tensor([6, 6, 0], dtype=int32))
    refused("do not add up to 12 keys", lengths=torch.tensor([13, -2, 1], dtype=int32))
    # More than an edit keeps.
    refused(
        "do not add up to 19 keys",
        keys=torch.zeros(19, 2 * DIM, dtype=torch.int8),
        tokens=torch.zeros(19, dtype=int32),
        lengths=torch.tensor([17, 1, 1], dtype=int32),
    )
    refused("a token is common to none or more", common=torch.tensor([[3, -1]]))
    refused("a token is common to none or more", {"texts": 2})
    with pytest.raises(KeyError, match="tokens"):
        KeyIndex.from_state({n: t for n, t in tensors.items() if n != "tokens"}, meta)


def test_bad_arguments() -> None:
    index = KeyIndex(DIM)
    short = TokenKeys(torch.tensor([3]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"must be \[1, 96\], got \[1, 4\]"):
        index.add([short], [0], ["a"])
    with pytest.raises(ValueError, match=r"must be \[2, 96\], got \[1, 96\]"):
        index.add([TokenKeys(torch.tensor([3, 4]), torch.zeros(1, DIM))], [0], ["a"])
    with pytest.raises(ValueError, match="2 keys, 1 shards and 2 ids"):
        index.add(PROMPTS[:2], [0], ["a", "b"])
    with pytest.raises(ValueError, match="shard >= 0"):
        index.add(PROMPTS[:1], [-1], ["a"])
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not finite"):
            index.add([TokenKeys(torch.tensor([3]), torch.full((1, DIM), bad))], [0], ["a"])
    with pytest.raises(ValueError, match="without tokens"):
        index.add([PROMPTS[0], _text([])], [0, 0], ["a", "b"])
    # Nothing half-added.
    assert len(index) == 0 and len(index.keys) == 0
    with pytest.raises(ValueError, match="empty"):
        index.nearest(QUERIES[:1])
    with pytest.raises(ValueError, match=r"must be \[1, 96\]"):
        KeyIndex(DIM, background=[short])
    with pytest.raises(ConfigError, match="key width is 0"):
        KeyIndex(DIM, width=0)


def test_a_key_of_zeros_is_like_nothing() -> None:
    index = _filled([TokenKeys(torch.tensor([3]), torch.zeros(1, DIM))], background=())
    score, row = index.nearest([QUERIES[0]])
    assert (score.item(), row.item()) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_stored_in_fp32(dtype: torch.dtype) -> None:
    halves = [TokenKeys(p.ids, p.activation.to(dtype)) for p in PROMPTS]
    floats = [TokenKeys(p.ids, p.activation.float()) for p in halves]
    assert _filled(halves).keys.equal(_filled(floats).keys)
