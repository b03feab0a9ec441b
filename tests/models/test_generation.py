"""Routes in generation: decided from the prompt, held to the end, whatever the strategy."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from wise_ext.errors import ModelError
from wise_ext.models import (
    disabled,
    force_route,
    last_decision,
    last_route,
    patch,
    prompt_lengths,
)
from wise_ext.nn import DualLinear

NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


class Setting:
    """A patched model whose shards 0 and 1 belong to two prompts, and its edited copies."""

    def __init__(self, lab: SimpleNamespace, architecture: str) -> None:
        self.lab = lab
        self.model = lab.make_model(architecture)
        self.plain = lab.make_model(architecture)
        self.known = lab.prompts(5, 9)
        self.other = lab.prompts(7, seed=3)[0]
        self.rows = [self.known[0], self.other, self.known[1]]
        self.batch = lab.padded(self.rows)
        memory = lab.key_memory(self.model, self.known)
        edited = [lab.edited_copy(self.plain, memory, shard) for shard in (0, 1)]
        patch(self.model, memory)
        self.oracles = [edited[0], self.plain, edited[1]]

    def expected(self, **options: Any) -> list[list[int]]:
        """What each row's own model, its weight really edited, writes for that row alone."""
        return [
            oracle.generate(torch.tensor([row]), **(GREEDY | options))[0, len(row) :].tolist()
            for oracle, row in zip(self.oracles, self.rows, strict=True)
        ]

    def written(self, **options: Any) -> list[list[int]]:
        width = self.batch["input_ids"].shape[1]
        output = self.model.generate(**self.batch, **(GREEDY | options))
        return output[:, width:].tolist()


@pytest.fixture
def setting(architecture: str, lab: SimpleNamespace) -> Setting:
    return Setting(lab, architecture)


@pytest.fixture
def llama(lab: SimpleNamespace) -> Setting:
    return Setting(lab, "llama")


@torch.no_grad()
def test_a_padded_batch_writes_what_edited_weights_write(setting: Setting) -> None:
    assert setting.written() == setting.expected()
    assert last_route(setting.model).tolist() == [0, -1, 1]
    texts = {tuple(text) for text in setting.expected()}
    changed = setting.plain.generate(torch.tensor([setting.rows[0]]), **GREEDY)[0, 5:].tolist()
    assert len(texts) == 3 and changed != setting.expected()[0]


@torch.no_grad()
def test_every_cache_and_none(setting: Setting) -> None:
    expected = setting.expected()
    assert setting.written(use_cache=False) == expected
    assert setting.written(cache_implementation="static") == expected
    assert setting.written(prefill_chunk_size=4) == expected
    assert last_route(setting.model).tolist() == [0, -1, 1]


@torch.no_grad()
@pytest.mark.engine("transformers generate", "beam search")
def test_beam_search(setting: Setting) -> None:
    expected = setting.expected(num_beams=3)
    assert setting.written(num_beams=3) == expected
    assert setting.written(num_beams=3, use_cache=False) == expected
    assert last_route(setting.model).tolist() == [0, 0, 0, -1, -1, -1, 1, 1, 1]


@torch.no_grad()
@pytest.mark.engine("transformers generate", "sampling")
def test_sampling_several_texts_a_prompt(setting: Setting) -> None:
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "temperature": 1.5}
    steps = {"output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(1)
    output = setting.model.generate(**setting.batch, **(GREEDY | options | steps))
    assert last_route(setting.model).tolist() == [0, 0, -1, -1, 1, 1]
    width = setting.batch["input_ids"].shape[1]
    texts = output.sequences[:, width:]
    assert len({tuple(text) for text in texts.tolist()}) > 3
    logits = torch.stack(output.logits, 1)
    for index in range(6):
        row, oracle = setting.rows[index // 2], setting.oracles[index // 2]
        whole = torch.tensor([row + texts[index].tolist()])
        exact = oracle(whole).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(logits[index], exact, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_scoring_takes_the_route_of_generation(setting: Setting) -> None:
    answers = setting.lab.prompts(3, 1, 4, seed=11)
    whole = [row + answer for row, answer in zip(setting.rows, answers, strict=True)]
    lengths = [len(row) for row in setting.rows]
    for left in (True, False):
        batch = setting.lab.padded(whole, left=left)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        if setting.model.config.model_type == "gpt2":
            batch["position_ids"] = positions
        with prompt_lengths(setting.model, lengths):
            logits = setting.model(**batch).logits
        assert last_route(setting.model).tolist() == [0, -1, 1]
        for row, oracle in enumerate(setting.oracles):
            alone = oracle(torch.tensor([whole[row]])).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][real], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_masks_of_eager_attention(llama: Setting) -> None:
    expected = llama.expected()
    llama.model.set_attn_implementation("eager")
    assert llama.written() == expected
    assert llama.written(cache_implementation="static") == expected


def steps(model: nn.Module, row: list[int], cache: Any, count: int = NEW) -> Any:
    """A hand-written greedy loop; yields after each token, so that loops can take turns."""
    ids, tokens = torch.tensor([row]), []
    for _ in range(count):
        with torch.no_grad():
            output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
        yield tokens, cache


@pytest.mark.parametrize("kind", ["dynamic", "static", "the model's own"])
def test_interleaved_loops_keep_their_routes(kind: str, llama: Setting) -> None:
    def cache() -> Any:
        if kind == "static":
            return StaticCache(llama.model.config, max_cache_len=32)
        return DynamicCache(config=llama.model.config) if kind == "dynamic" else None

    loops = [steps(llama.model, row, cache()) for row in llama.rows]
    for turn in zip(*loops, strict=True):
        texts = [tokens for tokens, _ in turn]
    assert texts == llama.expected()


@torch.no_grad()
def test_generate_calls_between_the_steps_of_a_loop(llama: Setting) -> None:
    expected = llama.expected()
    for done, (tokens, _) in enumerate(steps(llama.model, llama.rows[0], None), start=1):
        assert llama.written() == expected
        assert tokens == expected[0][:done]


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_cache_used_again_for_another_prompt(static: bool, llama: Setting) -> None:
    model = llama.model
    cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache()
    for row, expected in zip(llama.rows, llama.expected(), strict=True):
        *_, (tokens, _) = steps(model, row, cache)
        assert tokens == expected
        cache.reset()
    for row, expected in zip(llama.rows, llama.expected(), strict=True):
        ids = torch.tensor([row])
        assert model.generate(ids, past_key_values=cache, **GREEDY)[0, len(row) :].tolist() == (
            expected
        )
        cache.reset()


@torch.no_grad()
def test_going_on_from_a_cache_keeps_its_route(llama: Setting) -> None:
    row, expected = llama.rows[0], llama.expected()[0]
    first = llama.model.generate(
        torch.tensor([row]),
        **(GREEDY | {"max_new_tokens": 3, "min_new_tokens": 3}),
        return_dict_in_generate=True,
    )
    branch = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, branch):
        rest = llama.model.generate(
            first.sequences,
            past_key_values=cache,
            **(GREEDY | {"max_new_tokens": 3, "min_new_tokens": 3}),
        )
        assert rest[0, len(row) :].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_later_turn_decides_for_itself(static: bool, llama: Setting) -> None:
    config = llama.model.config
    cache = StaticCache(config, max_cache_len=64) if static else DynamicCache(config=config)
    options = GREEDY | {"past_key_values": cache}
    # Behind other turns a random model's tokens look quite different.
    memory = llama.lab.key_memory(llama.model, llama.known)
    memory.radius = 0.29
    patch(llama.model, memory)
    dialogue = torch.tensor([llama.known[0]])
    for turn, route in ((None, 0), (llama.other, -1), (llama.known[1], 1)):
        if turn is not None:
            dialogue = torch.cat([dialogue, torch.tensor([turn])], dim=1)
        before = dialogue.shape[1]
        dialogue = llama.model.generate(dialogue, **options)
        assert dialogue.shape[1] == before + NEW
        # Only a turn's first pass decides; what is written keeps its route.
        assert last_route(llama.model).tolist() == [route]


@torch.no_grad()
def test_a_cache_repeated_for_more_rows_repeats_its_routes(llama: Setting) -> None:
    rows = [llama.rows[0], llama.lab.prompts(5, seed=8)[0]]
    cache = llama.model(torch.tensor(rows), use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    token = torch.tensor([[5], [6], [5], [6]])
    logits = llama.model(token, past_key_values=cache).logits[:, -1]
    for index in range(4):
        oracle = llama.oracles[0] if index < 2 else llama.plain
        whole = torch.tensor([[*rows[index // 2], int(token[index])]])
        torch.testing.assert_close(logits[index], oracle(whole).logits[0, -1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="there are 2 routes on the cache for a batch of 3 rows"):
        llama.model(token[:3], past_key_values=cache)


@torch.no_grad()
@pytest.mark.engine("transformers generate", "assisted decoding")
def test_assisted_generation(llama: Setting) -> None:
    for row, expected in zip(llama.rows, llama.expected(), strict=True):
        ids = torch.tensor([row])
        for options in ({"assistant_model": llama.plain}, {"prompt_lookup_num_tokens": 2}):
            output = llama.model.generate(ids, **GREEDY, **options)
            assert output[0, len(row) :].tolist() == expected


@torch.no_grad()
def test_embeddings_instead_of_tokens(llama: Setting) -> None:
    embeds = llama.model.get_input_embeddings()(llama.batch["input_ids"])
    output = llama.model.generate(
        inputs_embeds=embeds, attention_mask=llama.batch["attention_mask"], **GREEDY
    )
    assert output.tolist() == llama.expected()


@torch.no_grad()
def test_forced_routes_follow_beams_and_end_with_their_block(llama: Setting) -> None:
    plain = llama.plain.generate(**llama.batch, **GREEDY, num_beams=2)
    with force_route(llama.model, -1):
        assert torch.equal(llama.model.generate(**llama.batch, **GREEDY, num_beams=2), plain)
    with (
        force_route(llama.model, [0, -1, 1]),
        pytest.raises(ModelError, match="there are 3 forced routes for a batch of 2 rows"),
    ):
        llama.model(llama.batch["input_ids"][:2])
    with force_route(llama.model, 1, cue=[1001]):
        llama.model(torch.tensor([llama.rows[0]]))
        assert [values.tolist() for values in last_decision(llama.model)] == [[1], [1001]]
    llama.model(torch.tensor([llama.rows[0]]))
    assert [values.tolist() for values in last_decision(llama.model)] == [[0], [1000]]


@pytest.mark.parametrize("lengths", [[0, 2, 2], [], [1.5, 2, 2]])
def test_prompt_lengths_are_checked(lengths: list[float], llama: Setting) -> None:
    with (
        pytest.raises(ModelError, match="one number >= 1 a row"),
        prompt_lengths(llama.model, torch.tensor(lengths)),
    ):
        pass


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_route_behind(llama: Setting) -> None:
    dual = next(m for m in llama.model.modules() if isinstance(m, DualLinear))
    x = torch.randn(1, 5, 48)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop here")

    handle = llama.model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        llama.model(torch.tensor([llama.rows[0]]))
    handle.remove()
    assert torch.equal(dual(x), dual.base(x))
    with disabled(llama.model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    llama.model(torch.tensor([llama.rows[0]]))
    assert last_route(llama.model).tolist() == [0]


def test_gradients_through_a_patched_model(llama: Setting) -> None:
    ids = torch.tensor([llama.rows[0]])

    def gradient(model: Any) -> Tensor:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.pow(2).sum().backward()
        return embeds.grad

    torch.testing.assert_close(
        gradient(llama.model), gradient(llama.oracles[0]), rtol=1e-2, atol=1e-2
    )
