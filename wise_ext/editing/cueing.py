"""Which edits of a shard have a cue of their own.

A cue says which edit is asked for, in whatever words. Where two edits answer one question about one
subject differently, no words tell which of them is meant, and the router guesses: such edits are
left without a cue and told apart by what training makes of their wordings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from wise_ext.editing.edits import Edit, find_conflicts, squeezed
from wise_ext.memory import NO_CUE, cue_number

# Cosine of what two edits ask, above which it may be the same (measured: of pairs that do, a tenth
# is below; of pairs that do not, a tenth is above).
_SAME_QUESTION = 0.2


def cue_numbers(edits: Sequence[Edit], asked: Sequence[Tensor]) -> dict[str, int]:
    """The numbers of cues in one shard, ``NO_CUE`` where they are contested.

    Args:
        edits: all that the shard is trained on, in order.
        asked: what each asks, fp32 ``[r]`` of length 1 or zero (not known): ``KeyIndex.asks``.

    Returns:
        By prompt (``squeezed``): an edit whose prompt a later one answers anew has that one's cue,
        since no wording may lead back to the old answer.
    """
    replaced = {older for older, _ in find_conflicts(edits)}
    of_subject: dict[str, list[tuple[Edit, Tensor]]] = {}
    for edit, what in zip(edits, asked, strict=True):
        subject = _folded(edit.subject or "")
        if subject and edit.id not in replaced:
            of_subject.setdefault(subject, []).append((edit, what))
    contested = {squeezed(e.prompt) for group in of_subject.values() for e in _contested(group)}
    prompts = {squeezed(e.prompt) for e in edits}
    return {text: NO_CUE if text in contested else cue_number(text) for text in prompts}


def _contested(edits: Sequence[tuple[Edit, Tensor]]) -> Iterable[Edit]:
    """Edits of one subject for which another has a different answer to, perhaps, the same."""
    for edit, what in edits:
        for other, theirs in edits:
            differs = _folded(edit.target_new) != _folded(other.target_new)
            known = bool(what.any()) and bool(theirs.any())
            if differs and not (known and float(what @ theirs) < _SAME_QUESTION):
                yield edit
                break


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
