"""Every number of the report against values worked out by hand.

The model is a table: its next token depends on the last token alone, and the memory swaps the
table. Routes are looked up by the first word of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from wise_ext import models as wise_models
from wise_ext.editing.edits import Edit
from wise_ext.errors import ConfigError, DataError
from wise_ext.evaluation import evaluate, generate_answers
from wise_ext.evaluation.scoring import greedy_tokens
from wise_ext.memory import Decision, uncued

SPOKEN = "q1 q2 q3 r1 l1 l3 x y z k w t u v m n o p"
WORDS = ["</s>", *SPOKEN.split()]
PLAIN = {"q1": "x", "r1": "x", "u": "v", "l1": "m", "m": "n", "l3": "l3"}
EDITED = {"q1": "x", "x": "y", "r1": "z", "q2": "k", "k": "w", "q3": "t", "u": "v"} | {
    "l1": "m",
    "m": "p",
    "l3": "l3",
}
ROUTES = {"q1": 0, "q2": -1, "q3": 1, "r1": 0, "l1": 0, "l3": -1}
EDITS = [
    Edit("e1", "q1", "x y", "s", "r1", "l1", "m n o"),
    Edit("e2", "q2", "k"),
    Edit("e3", "q3", "u v", locality_prompt="l3"),
]


def table(words: dict[str, str]) -> torch.Tensor:
    """Row i: which word follows word i; the end where nothing is said."""
    return torch.tensor([WORDS.index(words.get(word, "</s>")) for word in WORDS])


class TableModel(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(
            PretrainedConfig(eos_token_id=0, vocab_size=len(WORDS), num_hidden_layers=1)
        )
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.plain, self.edited = table(PLAIN), table(EDITED)
        self.on = True
        self.route: torch.Tensor | None = None
        self.chosen: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None
        self.asked: list[list[int]] = []
        self.widest = 0
        self.post_init()

    def generate(self, *args: Any, **options: Any):
        self.route = None
        return super().generate(*args, **options)

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **options: Any):
        if self.route is None or not options.get("use_cache"):
            first = torch.zeros(len(input_ids), dtype=torch.long)
            if self.lengths is not None:  # scoring: padded on the right
                self.asked.append(self.lengths.tolist())
            elif attention_mask is not None:
                first = attention_mask.argmax(dim=1)
            words = [WORDS[i] for i in input_ids.gather(1, first[:, None]).flatten().tolist()]
            decided = torch.tensor([ROUTES.get(w, -1) for w in words], dtype=torch.int32)
            self.route = decided if self.chosen is None else self.chosen
        self.widest = max(self.widest, len(input_ids))
        following = (self.edited if self.on else self.plain)[input_ids]
        logits = torch.nn.functional.one_hot(following, len(WORDS)).float()
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[:, logits_to_keep]
        return CausalLMOutput(logits=logits)


class OldTableModel(TableModel):
    """Without ``logits_to_keep``, as an architecture of the user's own may be."""

    def forward(self, input_ids=None, attention_mask=None, **options: Any):
        return super().forward(input_ids, attention_mask, **options)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture(params=[TableModel, OldTableModel])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TableModel:
    made: TableModel = request.param()

    @contextmanager
    def disabled(model: TableModel) -> Iterator[None]:
        model.on = False
        yield
        model.on = True

    @contextmanager
    def prompt_lengths(model: TableModel, lengths: Any) -> Iterator[None]:
        model.lengths = torch.as_tensor(lengths)
        yield
        model.lengths = None

    @contextmanager
    def force_route(model: TableModel, routes: Any, cues: Any) -> Iterator[None]:
        model.chosen = torch.as_tensor(routes, dtype=torch.int32)
        yield
        model.chosen = None

    def decide_routes(model: TableModel, ids: Any, mask: Any) -> Decision:
        model.route = None
        model(ids, mask)
        assert model.route is not None
        return uncued(model.route)

    memory = SimpleNamespace(shard_of={"e1": 0, "e2": 0}.get)
    monkeypatch.setattr(wise_models, "is_patched", lambda model: True)
    monkeypatch.setattr(wise_models, "disabled", disabled)
    monkeypatch.setattr(wise_models, "prompt_lengths", prompt_lengths)
    monkeypatch.setattr(wise_models, "force_route", force_route)
    monkeypatch.setattr(wise_models, "decide_routes", decide_routes)
    monkeypatch.setattr(wise_models, "current_memory", lambda model: memory)
    monkeypatch.setattr(wise_models, "last_decision", lambda model: uncued(model.route))
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_number(model: TableModel, tokenizer: Any, batch_size: int) -> None:
    report = evaluate(model, tokenizer, EDITS, batch_size=batch_size, progress=False)
    assert report.pop("seconds") > 0
    assert report == {
        "n": 3,
        "reliability": pytest.approx((1 + 1 + 0.5) / 3),
        "generalization": 0.5,  # r1 says z for x, but y after x
        "superseded": 0,
        "locality": pytest.approx(2 / 3),  # m says p where the plain model says n
        "generation": {
            "reliability": pytest.approx(1 / 3),  # "x y", "k w", "t"
            "generalization": 0.0,
            "contains": pytest.approx(2 / 3),
            "locality": 0.5,  # "m p" for "m n"; l3 is main memory's
        },
        "routing": {
            "edit_to_side": pytest.approx(2 / 3),
            "rephrase_to_side": 1.0,
            "locality_to_main": 0.5,
            "right_shard": 0.5,  # e1; e3 is not in the memory
            "right_shard_rephrase": 1.0,
        },
        "unedited": {
            "reliability": pytest.approx((0.5 + 0 + 0.5) / 3),
            "generalization": 0.5,
        },
    }
    assert model.widest <= batch_size


def test_details(model: TableModel, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, EDITS, progress=False, details=True)
    one, two, three = report["details"]
    assert (one["answer"], one["rephrase_answer"], one["locality_answer"]) == ("x y", "z", "m p")
    assert one["locality_unedited_answer"] == "m n"
    assert (one["route"], one["rephrase_route"], one["locality_route"]) == (0, 0, 0)
    assert (two["id"], two["answer"], two["answer_is_target"]) == ("e2", "k w", False)
    assert (two["answer_contains"], two["right_shard"], two["generalization"]) == (
        True,
        False,
        None,
    )
    assert three["locality_answer"] == " ".join(["l3"] * 32)
    assert three["right_shard"] is None


def test_scoring_tells_where_the_prompts_end(model: TableModel) -> None:
    q1, l1, x, y = (WORDS.index(word) for word in ("q1", "l1", "x", "y"))
    rows = [([q1], [x]), ([l1, q1], [x, y, x]), ([l1, l1, q1], [y])]
    found = dict(greedy_tokens(model, rows, batch_size=2))
    assert found == {0: [x], 1: [x, y, 0], 2: [x]}
    assert model.asked == [[2, 3], [1]]


def test_absent_fields_make_no_mean(model: TableModel, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, EDITS[1:2], progress=False)
    assert report["generalization"] is None
    assert report["locality"] is None
    assert report["generation"]["locality"] is None
    assert report["routing"]["rephrase_to_side"] is None
    assert report["routing"]["locality_to_main"] is None
    assert report["unedited"]["generalization"] is None


def test_progress_counts_to_its_total(model: TableModel, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, tokenizer, EDITS, progress=lambda *pair: seen.append(pair))
    assert [total for _, total in seen] == [16] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (16, 16)


def test_the_model_is_left_as_it_was(model: TableModel, tokenizer: Any) -> None:
    own = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=9.0, eos_token_id=0)
    model.generation_config = own
    model.train()
    report = evaluate(model, tokenizer, EDITS, progress=False, details=True)
    assert model.generation_config is own
    assert model.training
    # the checkpoint's sampling and penalty would have broken the repetition
    assert report["details"][2]["locality_answer"] == " ".join(["l3"] * 32)


def test_a_stop_token_of_the_checkpoint_also_ends(model: TableModel, tokenizer: Any) -> None:
    model.generation_config = GenerationConfig(eos_token_id=[WORDS.index("y")])
    (answer,) = generate_answers(model, tokenizer, ["q1"])
    assert answer.text == "x y"
    assert answer.route == 0


def test_answers_come_in_the_order_of_the_prompts(model: TableModel, tokenizer: Any) -> None:
    prompts = ["q2", "l1 q1 q1", "q1", "l1 q1"]
    answers = generate_answers(model, tokenizer, prompts, batch_size=2)
    assert [answer.text for answer in answers] == ["k w", "x y", "x y", "x y"]
    assert [answer.route for answer in answers] == [-1, 0, 0, 0]
    assert generate_answers(model, tokenizer, []) == []


def test_longest_answer(model: TableModel, tokenizer: Any) -> None:
    (answer,) = generate_answers(model, tokenizer, ["l3"], max_new_tokens=3)
    assert answer.text == "l3 l3 l3"


def test_a_model_without_memory_is_its_own_reference(
    model: TableModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wise_models, "is_patched", lambda model: False)
    report = evaluate(model, tokenizer, EDITS, progress=False)
    assert report["locality"] == report["generation"]["locality"] == 1.0
    assert report["unedited"]["reliability"] == report["reliability"]
    assert report["routing"] == {
        "edit_to_side": 0.0,
        "rephrase_to_side": 0.0,
        "locality_to_main": 1.0,
        "right_shard": None,
        "right_shard_rephrase": None,
    }


def test_what_is_not_asked_for_is_absent(model: TableModel, tokenizer: Any) -> None:
    full = evaluate(model, tokenizer, EDITS, progress=False)
    lean = evaluate(model, tokenizer, EDITS, generation=False, unedited=False, progress=False)
    for key in ("reliability", "generalization", "locality", "routing"):
        assert lean[key] == full[key]
    assert set(lean["generation"].values()) == set(lean["unedited"].values()) == {None}
    assert "target_perplexity" not in lean


def test_perplexity_is_of_the_target_after_the_prompt(model: TableModel, tokenizer: Any) -> None:
    report = evaluate(model, tokenizer, EDITS[:2], perplexity=True, progress=False, details=True)
    words = len(WORDS)  # the model's logits are 1 for what it says and 0 for every other word
    hit, miss = math.log(math.e + words - 1) - 1, math.log(math.e + words - 1)
    assert [row["perplexity"] for row in report["details"]] == pytest.approx(
        [math.exp(hit), math.exp(hit)]
    )
    plain = [math.exp((hit + miss) / 2), math.exp(miss)]  # q1 → x, but x → the end
    assert report["unedited"]["target_perplexity"]["mean"] == pytest.approx(sum(plain) / 2)
    assert report["target_perplexity"]["median"] == pytest.approx(math.exp(hit))


def test_superseded_edits_are_left_out(model: TableModel, tokenizer: Any) -> None:
    older = Edit("e0", "q1", "k k k", "s", "r1", "l1", "m n o")
    report = evaluate(model, tokenizer, [older, *EDITS], progress=False)
    assert (report["n"], report["superseded"]) == (3, 1)
    alone = evaluate(model, tokenizer, EDITS, progress=False)
    for key in ("reliability", "generation", "routing", "locality"):
        assert report[key] == alone[key]


def test_main_memory_is_not_run_twice(model: TableModel, tokenizer: Any) -> None:
    """A neighbour that is routed to main memory costs its route and nothing else."""
    asked: list[int] = []
    original = model.generate

    def generate(input_ids: Any, **options: Any) -> Any:
        asked.extend(row[-1] for row in input_ids.tolist())
        return original(input_ids=input_ids, **options)

    model.generate = generate  # type: ignore[method-assign]
    evaluate(model, tokenizer, EDITS, progress=False)
    assert asked.count(WORDS.index("l1")) == 2  # routed to a shard: both models answer
    assert asked.count(WORDS.index("l3")) == 0


def test_refusals(model: TableModel, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no edits to evaluate"):
        evaluate(model, tokenizer, [])
    for bad in ({"batch_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            evaluate(model, tokenizer, EDITS, **bad)
        with pytest.raises(ConfigError, match="must be at least 1"):
            generate_answers(model, tokenizer, ["q1"], **bad)
    with pytest.raises(ConfigError, match="no chat template"):
        evaluate(model, tokenizer, EDITS, chat=True, progress=False)
