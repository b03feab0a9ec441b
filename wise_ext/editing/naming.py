"""Whom or what a question is about, where nobody has said so."""

from __future__ import annotations

import re

_JOINING = "of|the|and|de|da|del|della|di|du|la|le|van|von|der"
_JOINS = _JOINING.split("|")
_NAME = re.compile(
    rf"[^\W\d_a-z][\w'’&-][\w'’.&-]*(?:\s+(?:(?:{_JOINING})\s+)*(?:[^\W\d_a-z]|\d)[\w'’.&-]*)+"
)
# Behind one of these a capital says nothing.
_OPENS = ".?!:\"“'\n"


def named_in(prompt: str) -> str | None:
    """The first name in a prompt: words in succession that begin with a capital.

    Names of one word are left alone, for any word may be one; so are prompts written in capitals
    throughout, and scripts that have none.
    """
    words = prompt.split()
    if sum(word[:1].islower() for word in words) < 2:
        return None
    for match in _NAME.finditer(prompt):
        name = match.group().split()
        before = prompt[: match.start()].rstrip()
        if not before or before[-1] in _OPENS:
            # The word that opens a sentence has a capital anyway.
            name = name[1:]
            while name and name[0] in _JOINS:
                name = name[1:]
        if len(name) > 1 and not any(word.islower() for word in name[-1:]):
            return re.sub(r"['’]s$", "", " ".join(name).strip(".,;:?!'’\""))
    return None
