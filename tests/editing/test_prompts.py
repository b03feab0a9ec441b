"""Prompts and targets become ids apart, and read as one text put together."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from wise_ext.editing.prompts import encode_prompt, encode_target, neutral_prompts, stop_token
from wise_ext.errors import ConfigError, DataError, ModelError

TEXTS = ["The river Osk runs through Tarn", "Mila Onn leads the Ardo choir", "a b c d e"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def byte_level(eos: str | None = "</s>", ends: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: the space belongs to the word behind it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, chat_template=TEMPLATE
    )


def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama-2's kind: a text gets a space in front by itself."""
    core = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    core.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_prompt_and_target_read_as_one_text(make) -> None:
    tokenizer = make()
    ids = encode_prompt(tokenizer, "The river") + encode_target(tokenizer, " Osk runs ")
    assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text == "The river Osk runs"


def test_prompt_has_its_special_tokens_and_the_target_none() -> None:
    tokenizer = byte_level()
    prompt = encode_prompt(tokenizer, "The river")
    assert prompt == tokenizer("The river")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    target = encode_target(tokenizer, "Osk", stop=False)
    assert target == tokenizer(" Osk", add_special_tokens=False)["input_ids"]
    assert encode_target(tokenizer, "Osk") == [*target, tokenizer.eos_token_id]


def test_the_prompt_never_changes_with_its_target() -> None:
    tokenizer = byte_level()
    # "choi" + "r" would be one token if both were tokenised together
    prompt = encode_prompt(tokenizer, "The Ardo choi")
    assert (prompt + encode_target(tokenizer, "r", stop=False))[: len(prompt)] == prompt


def test_a_tokenizer_that_closes_every_text() -> None:
    tokenizer = byte_level(ends=True)
    assert tokenizer("The river")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "The river") == encode_prompt(byte_level(), "The river")


def test_chat() -> None:
    tokenizer = byte_level()
    prompt = encode_prompt(tokenizer, "Who leads the choir?", chat=True)
    assert tokenizer.decode(prompt) == "<s>user: Who leads the choir?\nassistant:\n"
    assert prompt.count(tokenizer.bos_token_id) == 1
    target = encode_target(tokenizer, "Mila Onn", chat=True)
    assert tokenizer.decode(target) == "Mila Onn</s>"


def test_chat_without_a_template() -> None:
    with pytest.raises(ConfigError, match="no chat template: leave chat off"):
        encode_prompt(sentence_piece(), "Who?", chat=True)


def test_nothing_to_encode() -> None:
    with pytest.raises(DataError, match="has no tokens"):
        encode_prompt(sentence_piece(), "")
    with pytest.raises(DataError, match="has no tokens"):
        encode_target(byte_level(), " ")


def test_no_stop_token() -> None:
    tokenizer = byte_level(eos=None)
    with pytest.raises(ModelError, match="no end-of-text token"):
        stop_token(tokenizer)
    assert encode_target(tokenizer, "Osk", stop=False)


def test_neutral_prompts_are_many_and_distinct() -> None:
    prompts = neutral_prompts()
    assert len(prompts) >= 70
    assert len(set(prompts)) == len(prompts)
    assert all(prompt.strip() == prompt for prompt in prompts)
