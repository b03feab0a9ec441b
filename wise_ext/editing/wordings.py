"""Known relations and how people put them: another form of the same question.

An edit practised in its own wording alone is known by its form: a statement does not find what was
learned as a question. The relations and their wordings were written for this project; which of them
an edit is about is recognised by ``wise_ext.memory.RelationMap``.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from wise_ext.editing.prompts import mentions


class Relation(NamedTuple):
    """Wordings of one question; ``{}`` stands for its subject, one of ``kind``.

    Of ``anything`` one may ask nothing in particular ("Tell me about {}"): no edit answers that.
    """

    kind: str
    wordings: tuple[str, ...]


@cache
def relations() -> tuple[Relation, ...]:
    """All known relations; their places are the labels of the relation map."""
    return tuple(Relation(r["of"], tuple(r["wordings"])) for r in _read()["relations"])


def examples() -> list[list[tuple[str, str]]]:
    """By relation, its wordings with a subject of the fitting kind put in, and that subject."""
    subjects = _read()["subjects"]
    made = []
    for number, relation in enumerate(relations()):
        names = subjects[relation.kind]
        pairs = ((w, names[(number + i) % len(names)]) for i, w in enumerate(relation.wordings))
        made.append([(wording.format(name), name) for wording, name in pairs])
    return made


def reworded(number: int, subject: str, count: int, rng: random.Random) -> list[str]:
    """Up to ``count`` wordings of a relation about a subject, drawn without repetition."""
    wordings = relations()[number].wordings
    drawn = rng.sample(wordings, min(count, len(wordings)))
    return [wording.format(subject) for wording in drawn]


def moved(prompt: str, subject: str | None) -> str | None:
    """The prompt's words with its subject's name at the beginning of the text, or, if it stands
    there, no longer; None where the prompt does not name it.

    Most tokenizers write a word at the beginning of a text as other tokens than within it, so a
    name has to be known both ways.
    """
    named = mentions(prompt, subject)
    if not named:
        return None
    start, _ = named[0]
    before = prompt[:start].strip()
    return f"{prompt[start:]} {before}" if before else f"So, {prompt.strip()}"


@cache
def _read() -> dict[str, Any]:
    text = resources.files("wise_ext").joinpath("data/relations.json").read_text("utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
