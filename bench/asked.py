"""Prompts as users write them: the records of `bench/data/asked.jsonl`, and their token ids.

A line is a piece or a prompt. A **piece** is a system prompt or a conversation of about 500 tokens:
``{"piece": name, "messages": [{"role", "content"}, …]}``. A **prompt** has

* ``id``; ``kind`` (`KINDS`); ``case``: ``edit`` or ``edit_after_edit`` where an edited fact is
  asked, else what makes a false alarm tempting: ``unrelated`` (nothing), ``same_subject`` (another
  relation of an edited subject), ``open`` (the subject, and nothing in particular about it),
  ``same_relation`` (another subject), ``mentioned`` (an edited subject comes up early in a long
  conversation), ``answered`` (an earlier turn asked the fact);
* ``facts``: the demo facts it asks, empty for main memory. Of two, either is right;
* ``about``: the fact a negative comes close to, or (``edit_after_edit``) that was asked before;
* ``text``: what the user says last; ``form``: ``chat`` puts everything into the model's chat
  template, ``text`` leaves a lone text as it is, puts a system prompt above it, or writes a
  conversation as a transcript;
* ``after``: the piece in front; ``opening``: an exchange before that piece; ``first``: the user's
  first turn of a dialogue that goes on with a warm cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wise_ext.editing.prompts import encode_prompt
from wise_ext.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).with_name("data")
ASKED, ELSEWHERE = DATA / "asked.jsonl", DATA / "elsewhere.jsonl"

KINDS = (
    "bare",
    "rephrased",
    "system",
    "chat",
    "long",
    "second_question",
    "language",
    "typo",
    "two_facts",
    "later_turn",
    "embedded",
)
POSITIVE = ("edit", "edit_after_edit")
NEGATIVE = ("unrelated", "same_subject", "open", "same_relation", "mentioned", "answered")
FORMS = ("text", "chat")
_SPEAKERS = {"user": "User", "assistant": "Assistant"}

Message = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """One prompt; ``before`` is what stands in front of ``first`` or, without it, ``text``."""

    id: str
    kind: str
    case: str
    facts: tuple[str, ...]
    form: str
    text: str
    about: str | None = None
    before: tuple[tuple[str, str], ...] = ()
    first: str | None = None

    def messages(self, reply: str | None = None) -> list[Message]:
        """All messages up to where the model answers.

        Args:
            reply: the answer to ``first``, whose dialogue then goes on with ``text``; without it
                the dialogue is at its first turn.
        """
        turns = list(self.before)
        if self.first is not None:
            turns.append(("user", self.first))
            if reply is not None:
                turns += [("assistant", reply), ("user", self.text)]
        else:
            turns.append(("user", self.text))
        return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True)
class Neutral:
    """A text that asks nothing, its kind, and the (natural or programming) language it is in."""

    id: str
    kind: str
    text: str
    language: str = "en"


def read_asked(path: Path = ASKED) -> list[Asked]:
    """The prompts of a file, their pieces put in.

    Raises:
        DataError: a prompt names a piece that is not there.
    """
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    pieces = {r["piece"]: _turns(r["messages"]) for r in records if "piece" in r}
    found = []
    for record in records:
        if "piece" in record:
            continue
        record = {**record, "facts": tuple(record["facts"])}
        name, opening = record.pop("after", None), record.pop("opening", ())
        if name is not None and name not in pieces:
            raise DataError(f"{path}: {record['id']} comes after {name!r}: there is no such piece")
        before = [*zip(_SPEAKERS, opening, strict=False), *pieces.get(name, ())]
        found.append(Asked(**record, before=tuple(before)))
    return found


def read_elsewhere(path: Path = ELSEWHERE) -> list[Neutral]:
    """The neutral texts of a file."""
    lines = path.read_text("utf-8").splitlines()
    return [Neutral(**json.loads(line)) for line in lines if line]


def encode(tokenizer: PreTrainedTokenizerBase, asked: Asked, reply: str | None = None) -> list[int]:
    """Token ids of a prompt up to where the answer begins; see `Asked.messages` for ``reply``.

    Raises:
        DataError: the form is ``chat`` and the tokenizer has no chat template.
    """
    messages = asked.messages(reply)
    if asked.form == "text":
        return encode_prompt(tokenizer, transcript(messages, asked.first is not None))
    if not has_template(tokenizer):
        raise DataError("this tokenizer has no chat template: leave out prompts of the form 'chat'")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [int(i) for i in tokenizer(str(text), add_special_tokens=False)["input_ids"]]


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts of the form ``chat`` can be asked."""
    return bool(getattr(tokenizer, "chat_template", None))


def transcript(messages: Sequence[Message], dialogue: bool = False) -> str:
    """Messages as plain text: a lone question as it is, a dialogue with the speakers' names.

    Args:
        messages: the last one is the user's.
        dialogue: name the speakers even if there is one message: more will follow.
    """
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) == 1 and not dialogue:
        return "\n\n".join([*system, turns[0]["content"]])
    lines = [f"{_SPEAKERS[m['role']]}: {m['content']}" for m in turns]
    return "\n".join([*system, *lines, "Assistant:"])


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in messages]
