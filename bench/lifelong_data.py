"""The facts of a lifelong run: which files, in which order, and which half of them.

The files are not part of this repository: they are looked for in the folder that `--data` or
WISE_EXT_DATA names, else where the command is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wise_ext.editing.edits import Edit, read_edits
from wise_ext.editing.prompts import mentions
from wise_ext.errors import DataError

#: groups of files; a group is shuffled as a whole, and comes after the groups before it
_ZSRE = ("zsre_wise_edit", "zsre_train1k", "zsre_knowedit_extra")
DATASETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "zsre": (_ZSRE,),
    "counterfact": (("counterfact",),),
    "zsre+counterfact": (_ZSRE, ("counterfact",)),
    "extra": (("zsre_knowedit_extra",),),
    "hallucination": (("hallucination_edit",), ("hallucination_train",)),
    "temporal": (("temporal_edit",), ("temporal_train",)),
}
#: long targets: measured by perplexity, not by whether a generated answer is the target
TEXTS = ("hallucination", "temporal")
HALVES = ("all", "development", "unseen")
_SUFFIXES = (".dev.jsonl", ".jsonl", ".dev.json", ".json")


@dataclass(frozen=True)
class Pool:
    """What a run edits, in order.

    Attributes:
        edits: the facts.
        files: name, sha256 and number of records of every file they come from.
        dropped: records left out because an earlier one has their prompt: with another target
            (``conflicting``) or with the same one (``repeated``).
    """

    edits: tuple[Edit, ...]
    files: tuple[dict[str, Any], ...]
    dropped: dict[str, int]


def data_folder(given: Path | None = None) -> Path:
    """Where the data files are."""
    if given is not None:
        return given
    return Path(os.environ.get("WISE_EXT_DATA", "."))


def pool(
    dataset: str,
    folder: Path,
    *,
    half: str = "all",
    shuffle: int | None = None,
    offset: int = 0,
) -> Pool:
    """Read a data set.

    Args:
        dataset: one of ``DATASETS``.
        folder: where its files are.
        half: ``development`` or ``unseen`` keeps the records whose id hashes to an even or an odd
            number, so that a part stays unseen whatever else is chosen; ``all`` keeps all.
        shuffle: seed of a new order within each group of files; None keeps the files' order.
        offset: how many edits to leave out at the start.

    Raises:
        DataError: a file is missing or wrong, or nothing is left.
    """
    groups: list[list[Edit]] = []
    files: list[dict[str, Any]] = []
    for names in DATASETS[dataset]:
        group: list[Edit] = []
        for name in names:
            path = _find(folder, name)
            found = read_edits(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files.append({"file": path.name, "sha256": digest, "records": len(found)})
            group += _named_apart(found, name, [e.id for g in [*groups, group] for e in g])
        groups.append(group)
    groups, dropped = _without_repeats(groups)
    edits: list[Edit] = []
    for group in groups:
        kept = [edit for edit in group if half == "all" or half_of(edit.id) == half]
        if shuffle is not None:
            random.Random(shuffle).shuffle(kept)
        edits += kept
    if offset >= len(edits):
        raise DataError(
            f"offset {offset} leaves nothing of the {len(edits)} edits of {dataset}: use a smaller "
            "offset"
        )
    return Pool(tuple(edits[offset:]), tuple(files), dropped)


def half_of(edit_id: str) -> str:
    """The half that a record belongs to: by its id alone, so that it never changes sides."""
    return HALVES[1 + hashlib.sha256(edit_id.encode()).digest()[0] % 2]


def _find(folder: Path, name: str) -> Path:
    for suffix in _SUFFIXES:
        if (folder / (name + suffix)).is_file():
            return folder / (name + suffix)
    raise DataError(
        f"no {name}{_SUFFIXES[0]} in {folder}: name the folder that has it in WISE_EXT_DATA or by "
        "--data"
    )


def _named_apart(edits: Iterable[Edit], name: str, taken: Sequence[str]) -> list[Edit]:
    """Ids of two files that clash are told apart by the file's name."""
    known = set(taken)
    return [replace(e, id=f"{name}:{e.id}") if e.id in known else e for e in edits]


def _without_repeats(groups: Sequence[Sequence[Edit]]) -> tuple[list[list[Edit]], dict[str, int]]:
    first: dict[str, str] = {}
    dropped = {"conflicting": 0, "repeated": 0}
    kept: list[list[Edit]] = []
    for group in groups:
        kept.append([])
        for edit in group:
            prompt, target = " ".join(edit.prompt.split()), " ".join(edit.target_new.split())
            if prompt not in first:
                first[prompt] = target
                kept[-1].append(edit)
            else:
                dropped["repeated" if first[prompt] == target else "conflicting"] += 1
    return kept, dropped


def undisputed(edits: Sequence[Edit]) -> set[str]:
    """The ids of edits whose subject no other edit answers differently.

    The data sets ask some questions twice, in other words and with another answer, and no editor
    can give both to a rephrasing of either. An edit without a subject is its own.
    """
    answers: dict[str, set[str]] = {}
    for edit in edits:
        if edit.subject:
            answers.setdefault(_folded(edit.subject), set()).add(_folded(edit.target_new))
    return {
        edit.id for edit in edits if not edit.subject or len(answers[_folded(edit.subject)]) == 1
    }


def asks_the_same(dataset: str, folder: Path) -> set[str]:
    """The prompts of edits whose locality prompt asks for the edited fact itself: it names their
    subject, and its answer is what was right before the edit.

    No editor can change an answer in one wording and keep it in another. A file that does not say
    what was right before (``ground_truth``) has none.
    """
    found = set()
    for name in (name for group in DATASETS[dataset] for name in group):
        text = _find(folder, name).read_text("utf-8-sig")
        listed = text.lstrip().startswith("[")
        for record in json.loads(text) if listed else map(json.loads, text.strip().split("\n")):
            subject, asked = (record.get(k) or "" for k in ("subject", "locality_prompt"))
            kept = _folded(record.get("locality_ground_truth") or "")
            before = record.get("ground_truth") or []
            before = {_folded(t) for t in ([before] if isinstance(before, str) else before)}
            # several right answers stand in one text, with commas between them
            if mentions(asked, subject) and before & {kept, *map(str.strip, kept.split(","))}:
                found.add(record["prompt"].strip())
    return found


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
