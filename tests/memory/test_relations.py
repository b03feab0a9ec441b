"""What is asked about a subject: the fit against its definition, and what changes in a search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.memory import made_texts as made
from wise_ext.memory import KeyIndex, KeyRouter, TokenKeys
from wise_ext.memory.relations import RelationMap, around


def _wordings(relations: int, each: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means of relations, and wordings around them that vary most in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(relations, dim, generator=generator)
    loud = torch.randn(3, dim, generator=generator) * 4
    labels = torch.arange(relations).repeat_interleave(each)
    noise = torch.randn(len(labels), 3, generator=generator) @ loud
    quiet = 0.3 * torch.randn(len(labels), dim, generator=generator)
    return means[labels] + noise + quiet, labels


def _oracle(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of wordings with relations and with one another, by the definition: the whole
    covariance, inverted."""
    x = x.double()
    means = torch.stack([x[labels == i].mean(0) for i in range(int(labels.max()) + 1)])
    within = x - means[labels]
    covariance = within.T @ within / len(x)
    covariance += 0.3 * covariance.diagonal().mean() * torch.eye(x.shape[1])
    values, vectors = torch.linalg.eigh(covariance)
    white = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    centred, known = (x - x.mean(0)) @ white, (means - x.mean(0)) @ white
    axes = torch.linalg.svd(known, full_matrices=False)[2]
    rank = torch.linalg.matrix_rank(known)
    centred, known = normalize(centred @ axes[:rank].T, dim=-1), normalize(known, dim=-1)
    return centred @ (known @ axes[:rank].T).T, centred @ centred.T


def _apply(map_: RelationMap, x: Tensor) -> Tensor:
    """What wordings of one token ask."""
    return map_.apply(x.unsqueeze(1), torch.ones(len(x), 1, dtype=torch.bool))


@pytest.mark.parametrize(("relations", "each", "dim"), [(5, 4, 30), (12, 3, 8), (2, 2, 40)])
def test_the_fit_is_its_definition(relations: int, each: int, dim: int) -> None:
    x, labels = _wordings(relations, each, dim)
    map_ = RelationMap.fit(x, labels)
    asked = _apply(map_, x)
    to_known, to_others = _oracle(x, labels)
    torch.testing.assert_close(asked @ map_.known.T, to_known.float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(asked @ asked.T, to_others.float(), rtol=0, atol=2e-3)
    assert map_.project.shape == (dim, min(relations - 1, dim))


def test_new_wordings_are_told_apart_where_plain_cosines_fail() -> None:
    x, labels = _wordings(10, 12, 64)
    known, new = labels % 1 == 0, torch.arange(len(x)) % 12 >= 8
    map_ = RelationMap.fit(x[known & ~new], labels[~new])
    asked = _apply(map_, x[new])
    assert (asked @ map_.known.T).argmax(1).eq(labels[new]).float().mean() > 0.95
    means = torch.stack([x[~new][labels[~new] == i].mean(0) for i in range(10)])
    plain = normalize(x[new] - x.mean(0), dim=-1) @ normalize(means - x.mean(0), dim=-1).T
    assert plain.argmax(1).eq(labels[new]).float().mean() < 0.8


@given(st.integers(0, 99), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_fit_ignores_where_and_how_large(seed: int, shift: float, scale: float) -> None:
    x, labels = _wordings(4, 3, 12, seed)
    one, two = RelationMap.fit(x, labels), RelationMap.fit(x * scale + shift, labels)
    a, b = _apply(one, x), _apply(two, x * scale + shift)
    torch.testing.assert_close(a @ one.known.T, b @ two.known.T, rtol=0, atol=5e-3)
    assert one.known.norm(dim=-1).sub(1).abs().max() < 1e-3


@given(st.integers(0, 99), st.floats(-1e-13, 1e-13))
def test_rounding_does_not_change_the_map(seed: int, noise: float) -> None:
    x, labels = _wordings(6, 3, 20, seed)
    generator = torch.Generator().manual_seed(seed)
    other = x.double() * (1 + noise * torch.rand(x.shape, generator=generator))
    for one, two in zip(RelationMap.fit(x, labels), RelationMap.fit(other, labels), strict=True):
        assert one.numpy().tobytes() == two.numpy().tobytes()


def test_nothing_to_learn() -> None:
    x, labels = _wordings(3, 2, 6)
    for few in (
        RelationMap.fit(x[:2], labels[:2]),
        RelationMap.fit(x[:1].expand(6, 6), labels),
    ):
        assert few.known.shape[0] == 0 or few.project.shape[1] == 0
        assert few.project.shape[0] == 6
    # One wording each: nothing is known of how wordings vary, and relations are still apart.
    alone = RelationMap.fit(x[::2], labels[::2])
    asked = _apply(alone, x[::2])
    assert (asked @ alone.known.T).argmax(1).tolist() == [0, 1, 2]


def test_a_prompt_of_nothing_but_its_subject_asks_nothing() -> None:
    x, labels = _wordings(3, 4, 6)
    map_ = RelationMap.fit(x, labels)
    kept = torch.tensor([[True, True], [False, False]])
    asked = map_.apply(torch.full((2, 2, 6), 7.0), kept)
    assert asked[1].eq(0).all() and math.isclose(float(asked[0].norm()), 1, abs_tol=1e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=64))
def test_around(flags: list[tuple[bool, bool]]) -> None:
    named = torch.tensor([[n and r for n, r in flags]])
    real = torch.tensor([[r for _, r in flags]])
    places = [i for i, (n, r) in enumerate(flags) if n and r]
    assert around(named, real)[0].tolist() == [
        r and not (n and r) and any(abs(i - p) <= 10 for p in places)
        for i, (n, r) in enumerate(flags)
    ]


# Words 30-39 are names, 40-59 say what is asked, the rest is common.
_RELATIONS = [[40, 41], [44, 45], [48, 49]]


def _about(ids: list[int], seed: int) -> TokenKeys:
    text = made.text(ids, seed=seed, noise=0.2)
    return text._replace(subject=(text.ids >= 30) & (text.ids < 40))


def _index(known: Sequence[list[int]] = _RELATIONS) -> KeyIndex:
    relations = [
        [_about([0, word, 30 + n, 1 + n % 3], seed=n) for word in words for n in range(3)]
        for words in known
    ]
    asking = [made.text([0, *words, 1], seed=n) for n, words in enumerate(_RELATIONS * 4)]
    background = [*made.background(), *asking]
    return KeyIndex(made.DIM, background=background, relations=relations)


def _routes(index: KeyIndex, queries: list[TokenKeys], lead: float) -> list[int]:
    found = index.prepare().find(*made.batch(queries), 0.4, lead)
    return found.tolist()


def test_another_relation_of_the_subject_stays_in_main_memory() -> None:
    index = _index()
    index.add([_about([0, 40, 35, 1], seed=50)], [0], ["a"])
    same, other = made.text([2, 41, 35], seed=60, noise=0.2), made.text([2, 44, 35], seed=61)
    nobody = made.text([2, 41, 36], seed=62)
    assert _routes(index, [same, other, nobody], 2.0) == [0, 0, -1]
    assert _routes(index, [same, other, nobody], 0.5) == [0, -1, -1]
    # A conversation before it changes neither.
    talk = list(range(4, 30)) * 2
    behind = [made.text([*talk, *q.ids.tolist()], seed=63, noise=0.2) for q in (same, other)]
    assert _routes(index, behind, 0.5) == [0, -1]


def test_of_two_edits_of_a_subject_the_one_that_is_asked_for_is_found() -> None:
    index = _index()
    index.add([_about([0, 40, 35, 1], 50), _about([0, 44, 35, 1], 51)], [0, 1], ["a", "b"])
    asked = [made.text([2, word, 35, 3], seed=70 + word, noise=0.2) for word in (41, 45, 49)]
    assert _routes(index, asked, 0.5) == [0, 1, -1]
    router = KeyRouter("early", index, 0.4, 0.5)
    assert router.decide(*made.batch(asked)).route.tolist() == [0, 1, -1]


def test_an_edit_in_two_wordings_asks_what_the_first_does() -> None:
    index = _index()
    first, second = _about([0, 40, 35, 1], seed=50), _about([2, 36, 1], seed=51)
    index.add([first, second], [3, 3], ["a", "a"])
    assert index.ids == ["a", "a"] and index.asked[0].equal(index.asked[1])
    index.add([_about([0, 44, 37, 1], seed=52)], [4], ["b"])
    asked = [made.text([2, word, 36], seed=word, noise=0.2) for word in (41, 45)]
    assert _routes(index, asked, 0.5) == [1, -1]
    index.reorder(["b", "a"])
    assert index.ids == ["b", "a", "a"] and index.shards.tolist() == [4, 3, 3]
    assert index.like([made.text([2, 41, 36], seed=1)], 0.4) == [["a"]]
    assert index.remove("a") == 2 and index.ids == ["b"]


def test_in_another_wording_an_edit_is_known_by_its_name_alone() -> None:
    index = _index()
    index.add([_about([0, 40, 35, 1], 50), _about([36, 37, 40, 1], 51)], [0, 0], ["a", "a"])
    assert index.tokens.tolist() == [0, 40, 35, 1, 36, 37]
    assert index.named.tolist() == [False, False, True, False, True, True]
    # One that does not say what its subject is keeps all of it.
    index.add([made.text([0, 40, 38], 52), made.text([38, 40, 0], 53)], [1, 1], ["b", "b"])
    assert index.lengths.tolist() == [4, 2, 3, 3]


def test_the_words_of_a_question_do_not_help_another_subject() -> None:
    stored, asked = [0, 40, 59, 35, 1], made.text([2, 40, 59, 36], seed=60, noise=0.2)
    told, untold = _index(), _index()
    told.add([_about(stored, 50)], [0], ["a"])
    untold.add([made.text(stored, 50, noise=0.2)], [0], ["a"])
    assert float(told.nearest([asked])[0]) < 0.4 < 0.5 < float(untold.nearest([asked])[0])


def test_another_wording_of_an_edit_makes_no_word_common() -> None:
    one, two = _index(), _index()
    one.add([_about([0, 40, 35, 1], 50)], [0], ["a"])
    two.add([_about([0, 40, 35, 1], 50), _about([35, 40, 0], 51)], [0, 0], ["a", "a"])
    assert two.prepare().weights[0].equal(one.prepare().weights[0])


def test_an_edit_that_does_not_name_its_subject_is_never_passed_over() -> None:
    index = _index()
    index.add([made.text([0, 40, 35, 1], seed=50)], [0], ["a"])
    assert index.asked.eq(0).all() and not index.named.any()
    assert _routes(index, [made.text([2, 44, 35], seed=61)], 0.01) == [0]


def test_without_known_relations_only_the_radius_counts() -> None:
    index = _index(known=())
    index.add([_about([0, 40, 35, 1], seed=50)], [0], ["a"])
    assert index.asked.shape == (1, 0)
    assert _routes(index, [made.text([2, 44, 35], seed=61)], 0.01) == [0]


@given(st.integers(0, 50), st.sampled_from([0.2, 0.7, 2.0]))
def test_a_search_is_the_definition_row_by_row(seed: int, lead: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    index = _index()
    stored = [_about([0, draw(40, 50), draw(34, 36), draw(1, 4)], seed + n) for n in range(6)]
    index.add(stored, list(range(6)), [str(n) for n in range(6)])
    queries = [made.text([draw(0, 30), draw(40, 50), draw(34, 37)], seed=n) for n in range(5)]
    prepared = index.prepare()
    wanted = []
    for query in queries:
        scores = prepared.scores(*made.batch([query]))[0]
        chosen, standing = -1, -math.inf
        for i in sorted(range(6), key=lambda i, s=scores: (round(float(s[i]), 5), i))[::-1]:
            other, likeness = _asked(index, stored[i], query)
            rank = float(scores[i]) + 0.1 * likeness
            fits = scores[i] > 0.4 and other - 1.5 * likeness <= lead
            if fits and rank > standing + 1e-5:
                chosen, standing = i, rank
        wanted.append(chosen)
    assert _routes(index, queries, lead) == wanted


def _asked(index: KeyIndex, stored: TokenKeys, query: TokenKeys) -> tuple[float, float]:
    """How like what is asked is to another relation and to the edit's own, the subject's name found
    by what its words are."""
    named = torch.isin(query.ids, stored.ids[stored.subject])
    real = torch.ones(1, len(named), dtype=torch.bool)
    tokens = index.map.tokens(query.activation[None], real)
    asks = index.relations.apply(tokens, around(named.unsqueeze(0), real))[0]
    own = index.asks(stored)
    if not asks.any() or not own.any():
        return -math.inf, 0.0
    return float((index.relations.known @ asks).max()), float(own @ asks)


def test_no_lead_is_needed_to_tell_two_edits_of_a_subject_apart() -> None:
    """Though the other was stored last, and the name scores as well."""
    for order in ([0, 1], [1, 0]):
        index = _index()
        told = [_about([0, 40, 35, 1], seed=50), _about([0, 44, 35, 1], seed=51)]
        index.add([told[i] for i in order], [0, 0], [str(i) for i in order])
        asked = [made.text([2, 41, 35, 3], seed=61), made.text([2, 45, 35, 3], seed=62)]
        assert _routes(index, asked, 3.0) == [order.index(0), order.index(1)]


def test_relations_are_stored_and_refused_like_the_rest() -> None:
    index = _index()
    index.add([_about([0, 40, 35, 1], seed=50)], [0], ["a"])
    tensors, meta = index.state_tensors(), index.state_meta()
    again = KeyIndex.from_state(tensors, meta)
    query = [made.text([2, 44, 35], seed=61)]
    assert _routes(again, query, 0.5) == _routes(index, query, 0.5) == [-1]
    assert again.nbytes() == index.nbytes()
    for name, value, match in (
        ("relation_known", tensors["relation_known"][:, 1:], "relation project must be"),
        ("relation_known", tensors["relation_known"].double(), "relation known must be fp32"),
        ("relation_centre", tensors["relation_centre"][1:], "relation centre must be fp32"),
        ("asked", tensors["asked"][:, 1:], r"asked must be torch.int8 \[1, 2\]"),
        ("named", tensors["named"][1:], r"named must be torch.bool \[4\]"),
    ):
        with pytest.raises(ValueError, match=match):
            KeyIndex.from_state(tensors | {name: value}, meta)
    with pytest.raises(ValueError, match=r"subject must be bool \[4\]"):
        index.add([_about([0, 40, 35, 1], 0)._replace(subject=torch.ones(3))], [0], ["b"])


def test_a_wording_has_to_ask_something() -> None:
    with pytest.raises(ValueError, match="nothing but its subject"):
        KeyIndex(made.DIM, relations=[[_about([30, 31], 0)], [_about([0, 30], 1)]])


def test_edits_take_their_relation_along() -> None:
    index = _index()
    index.add([_about([0, w, 35, 1], w) for w in (40, 44, 48)], [0, 1, 2], ["a", "b", "c"])
    asked, named = index.asked.clone(), index.named.clone()
    index.reorder(["c", "a", "b"])
    assert index.asked.equal(asked[[2, 0, 1]]) and index.named.equal(named)
    index.remove("a")
    assert index.asked.equal(asked[[2, 1]]) and len(index.named) == 8
