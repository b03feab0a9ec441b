"""Whom or what a question is about, where nobody has said so."""

from __future__ import annotations

import re
from collections.abc import Iterator

# What stands between the words of a name, and what does in titles.
_JOINING = "of|the|and|de|da|del|della|di|du|la|le|van|von|der"
_IN_TITLES = f"{_JOINING}|a|an|at|by|for|from|in|on|or|to|with"
# A capital that is not within a word of small letters, and what may follow it in one.
_CAPITAL, _REST = r"(?<![^\W_])[^\W\d_a-z]", r"[\w'’.&-]*"
_SINGLE = re.compile(rf"{_CAPITAL}[\w’'-]+")
_POSSESSIVE = re.compile(r"['’]s?$")
# Behind one of these a capital says nothing.
_OPENS = ".?!:\"“'\n"
# Behind these a word alone says where, when or in what, not of what ("in Python", "on Monday").
_WHERE = re.compile(r"\b(at|by|during|for|from|in|into|on|since|to|until|with)\s+$", re.IGNORECASE)
# Behind a word alone these say that it is no mere part of a term.
_GOES_ON = re.compile(
    r"\s*($|[,;:.?!)\"”]|(and|are|as|at|be|but|by|can|could|did|do|does|for|from|had|has|have|if|in|"
    r"is|made|may|of|on|or|should|than|that|to|was|were|when|which|while|who|will|with|would)\b)"
)


def named_in(prompt: str) -> str | None:
    """The first name in a prompt: words in succession that begin with a capital.

    If there is none, a title with other small words in it; if there is no such either, a word alone
    that owns something, or that is neither an adjunct nor a part of a term ("in Python", "the Bohr
    radius"). No names are there in prompts written in capitals throughout, and in scripts that have
    none.
    """
    if sum(word[:1].islower() for word in prompt.split()) < 2:
        return None
    found = (*_several(prompt, _JOINING), *_several(prompt, _IN_TITLES), *_alone(prompt))
    return next(iter(found), None)


def _several(prompt: str, joining: str) -> Iterator[str]:
    """Names of several words, in order."""
    joins = joining.split("|")
    more = rf"(?:\s+(?:(?:{joining})\s+)*(?:[^\W\d_a-z]|\d){_REST})+"
    for match in re.finditer(rf"{_CAPITAL}[\w'’&-]{_REST}{more}", prompt):
        words = match.group().split()
        if _opens(prompt, match.start()):
            # The word that opens a sentence has a capital anyway.
            words = words[1:]
            while words and words[0] in joins:
                words = words[1:]
        # What is no capital beyond ASCII looks like one to the pattern.
        if len(words) > 1 and not any(w[0].islower() for w in words if w not in joins):
            yield _POSSESSIVE.sub("", " ".join(words).strip(".,;:?!'’\""))


def _alone(prompt: str) -> Iterator[str]:
    """Names of one word, in order."""
    for match in _SINGLE.finditer(prompt):
        word = _POSSESSIVE.sub("", match.group())
        if not (word[0].isupper() and word[1:].islower()) or _opens(prompt, match.start()):
            continue
        owns = word != match.group()
        where = _WHERE.search(prompt, 0, match.start())
        if owns or (not where and _GOES_ON.match(prompt, match.end())):
            yield word


def _opens(prompt: str, place: int) -> bool:
    """Whether a sentence begins at a place."""
    before = prompt[:place].rstrip()
    return not before or before[-1] in _OPENS
