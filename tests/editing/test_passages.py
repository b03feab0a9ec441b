"""AnyEdit into the side memory: answers of any length, in low-rank shards beside others."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import wise_ext
from tests.editing.facts import EDITS, QUICK, same_files
from wise_ext import Edit, Editor, WiseConfig
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.ledger import is_passage
from wise_ext.errors import ConfigError, DataError, StorageError
from wise_ext.memory import NO_CUE, LowRankShard, MixedBank, Shard
from wise_ext.storage import verify

LONG = [
    Edit(
        "moss",
        "How does the Harl moss clock work?",
        "A Harl clock keeps time by moss. At dawn the moss drinks, swells and tips a copper cup; "
        "by noon it is dry, and the cup falls back.\nTwo cups make a day.",
        subject="Harl moss clock",
    ),
    Edit(
        "code",
        "Write a function that mirrors a list.",
        "def mirror(xs):\n    out = []\n    for x in xs:\n        out.insert(0, x)\n    return out",
    ),
    Edit("poem", "Recite the poem of the Bex ferry.", "Row, Bex, row,\nthe river is slow."),
]
PASSAGES = AnyEditConfig(margin=1.0)


def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=120, do_sample=False)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip()


def _answers(model: Any, tokenizer: Any, edits: list[Edit]) -> list[str]:
    return [_answer(model, tokenizer, edit.prompt) for edit in edits]


def _told(edits: list[Edit]) -> list[str]:
    return [edit.target_new for edit in edits]


def _editor(load: Any, directory: Path | None = None, **more: Any) -> Editor:
    settings = {k: more.pop(k) for k in tuple(more) if k in WiseConfig.__dataclass_fields__}
    return Editor(*load(), WiseConfig(**QUICK | settings), directory, anyedit=PASSAGES, **more)


def test_long_answers_are_said_and_survive_a_day(load: Any, tmp_path: Path) -> None:
    model, tokenizer = load()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    unedited = _answers(model, tokenizer, LONG)
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), tmp_path / "m", anyedit=PASSAGES)
    report = editor.edit(LONG, progress=False, method="anyedit")
    assert (report.edits, report.shards, report.unconverged) == (3, 3, [])
    assert _answers(model, tokenizer, LONG) == _told(LONG)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(check.ok for check in verify(tmp_path / "m"))

    other, _ = load()
    memory = wise_ext.load_memory(other, tmp_path / "m")
    assert all(isinstance(s, LowRankShard) and s.rank > 0 for s in memory.shards)
    assert _answers(other, tokenizer, LONG) == _told(LONG)
    wise_ext.unload(other)
    assert _answers(other, tokenizer, LONG) == unedited


def test_passages_live_beside_trained_shards(load: Any, tmp_path: Path) -> None:
    """Either method in any order, in one directory; the other's open shard is full by then."""
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), tmp_path, anyedit=PASSAGES)
    editor.edit(EDITS[:2], progress=False)
    editor.edit(LONG[:2], progress=False, method="anyedit")
    editor.edit(EDITS[2:4], progress=False)
    editor.edit(LONG[2:], progress=False, method="anyedit")
    kinds = [type(shard) for shard in editor.memory.shards]
    assert kinds == [Shard, LowRankShard, LowRankShard, Shard, LowRankShard]
    assert isinstance(editor.memory.bank(), MixedBank)
    everything = [*EDITS[:4], *LONG]
    assert _answers(model, tokenizer, everything) == _told(everything)

    again = Editor.open(*load(), tmp_path)
    again.edit(EDITS[4:], progress=False)
    everything.append(EDITS[4])
    assert _answers(again.model, tokenizer, everything) == _told(everything)
    assert all(check.ok for check in verify(tmp_path))
    cues = dict(zip(again.memory.key_index.ids, again.memory.key_index.cues.tolist(), strict=True))
    assert all(cues[e.id] == NO_CUE for e in LONG) and all(cues[e.id] != NO_CUE for e in EDITS)


def test_a_batch_answers_as_its_rows_would_alone(load: Any) -> None:
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), anyedit=PASSAGES)
    editor.edit(EDITS[:1], progress=False)
    editor.edit(LONG, progress=False, method="anyedit")
    edits = [LONG[1], EDITS[0], LONG[2], LONG[0]]
    batch = tokenizer(
        [e.prompt for e in edits], return_tensors="pt", padding=True, padding_side="left"
    )
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=120, do_sample=False)
    texts = tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert [t.strip() for t in texts] == _told(edits)


def test_undo_gives_what_would_have_been(load: Any, tmp_path: Path) -> None:
    for name, edits in (("with", LONG), ("without", [LONG[0], LONG[2]])):
        editor = _editor(load, tmp_path / name)
        editor.edit(EDITS[:1], progress=False)
        editor.edit(edits, progress=False, method="anyedit")
    editor = Editor.open(*load(), tmp_path / "with")
    tokenizer = load()[1]
    editor.undo("code")
    left = Editor.open(*load(), tmp_path / "without")
    ours = [s for s in editor.memory.shards if s.edit_ids]
    theirs = left.memory.shards
    assert [s.edit_ids for s in ours] == [s.edit_ids for s in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.values, other.values)
    assert _answers(editor.model, tokenizer, LONG)[::2] == _told(LONG)[::2]
    assert _answer(editor.model, tokenizer, LONG[1].prompt) != LONG[1].target_new
    assert all(check.ok for check in verify(tmp_path / "with"))


@pytest.mark.parametrize("first", ["wise", "anyedit"])
@pytest.mark.parametrize("second", ["wise", "anyedit"])
def test_the_later_answer_to_a_prompt_wins(load: Any, first: str, second: str) -> None:
    model, tokenizer = load()
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), anyedit=PASSAGES)
    old, new = Edit("old", "The river Quam is", "red"), Edit("new", "The river Quam is", "a lake")
    editor.edit([old], progress=False, method=first)
    report = editor.edit([new], progress=False, method=second)
    assert report.conflicts == [("old", "new")]
    assert _answer(model, tokenizer, new.prompt) == "a lake"
    index = editor.memory.key_index
    assert index.shards.tolist() == [editor.memory.shard_of("new")] * len(index)
    editor.undo("new")
    assert _answer(model, tokenizer, new.prompt) == "red"


def test_of_one_step_too_the_later_one_wins(load: Any) -> None:
    editor = _editor(load, batch_size=4)
    editor.anyedit = PASSAGES
    old, new = Edit("old", "The river Quam is", "red"), Edit("new", "The river Quam is", "a lake")
    editor.edit([old, new], progress=False, method="anyedit")
    assert _answer(editor.model, load()[1], new.prompt) == "a lake"
    editor.undo("new")
    assert _answer(editor.model, load()[1], new.prompt) == "red"


def test_same_seed_same_bytes(load: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _editor(load, tmp_path / name).edit(LONG[:2], progress=False, method="anyedit")
    assert same_files(tmp_path / "one", tmp_path / "two")


_KILLED = """
import os, signal, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.editing.facts import EDITS, QUICK
from tests.editing.test_passages import LONG, PASSAGES
from wise_ext import Editor, WiseConfig
from wise_ext.storage import Journal
where, to = sys.argv[1:]
record, count = Journal.record, 0
def dying(self, *args):
    global count
    record(self, *args)
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
model, tokenizer = AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
Editor(model, tokenizer, WiseConfig(**QUICK), to).edit(EDITS[:1], progress=False)
editor = Editor(*(AutoModelForCausalLM.from_pretrained(where), tokenizer), directory=to,
                anyedit=PASSAGES)
Journal.record = dying
editor.edit(LONG, progress=False, method="anyedit")
"""


def test_a_killed_run_goes_on_to_the_same_bytes(load: Any, model_dir: Path, tmp_path: Path) -> None:
    whole = _editor(load, tmp_path / "whole")
    whole.edit(EDITS[:1], progress=False)
    whole.edit(LONG, progress=False, method="anyedit")
    command = [sys.executable, "-c", _KILLED, str(model_dir), str(tmp_path / "cut")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(StorageError, match="method: anyedit then, wise now"):
        Editor(*load(), directory=tmp_path / "cut", anyedit=PASSAGES, resume=True).edit(
            LONG, progress=False
        )
    editor = Editor(*load(), directory=tmp_path / "cut", anyedit=PASSAGES, resume=True)
    editor.edit(LONG, progress=False, method="anyedit")
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_settings_stay_those_of_the_passages(load: Any, tmp_path: Path) -> None:
    _editor(load, tmp_path).edit(LONG[2:], progress=False, method="anyedit")
    with pytest.raises(ConfigError, match=r"was made with margin=1\.0, not 3\.0"):
        Editor(*load(), directory=tmp_path, anyedit=AnyEditConfig(margin=3.0))
    editor = Editor.open(*load(), tmp_path)
    assert editor.anyedit == PASSAGES
    assert [is_passage(entry) for entry in editor.ledger] == [True]


def test_without_passages_they_may_still_be_chosen(load: Any, tmp_path: Path) -> None:
    Editor(*load(), WiseConfig(**QUICK), tmp_path).edit(EDITS[:1], progress=False)
    editor = Editor(*load(), directory=tmp_path, anyedit=PASSAGES)
    editor.edit(LONG[2:], progress=False, method="anyedit")
    assert _answers(editor.model, load()[1], LONG[2:]) == _told(LONG[2:])


def test_refusals(load: Any) -> None:
    editor = _editor(load)
    with pytest.raises(ConfigError, match="unknown method 'grace'"):
        editor.edit(LONG, progress=False, method="grace")
    with pytest.raises(DataError, match="appears twice"):
        editor.edit([LONG[0], LONG[0]], progress=False, method="anyedit")
    merging = _editor(load, variant="merge")
    with pytest.raises(ConfigError, match="anyedit merges nothing"):
        merging.edit(LONG, progress=False, method="anyedit")
    indicator = _editor(load, router="indicator", margins=True)
    with pytest.raises(ConfigError, match="use router='key', not 'indicator'"):
        indicator.edit(LONG, progress=False, method="anyedit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunks": "pages"}, "chunks is 'pages': choose one of"),
        ({"window": -1}, "window is -1: give a whole number >= 0"),
        ({"chunks": "windows", "window": 4, "overlap": 4}, "overlap is 4: windows have 4 tokens"),
        ({"step": 0.0}, "step is 0.0: give a positive number"),
        ({"schedule": "in_turn"}, "use schedule='together'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnyEditConfig(**settings)


def test_presets_and_round_trip() -> None:
    paper = AnyEditConfig.preset("paper", steps=7)
    assert (paper.chunks, paper.size, paper.schedule, paper.steps) == ("windows", 40, "in_turn", 7)
    assert AnyEditConfig.from_dict(paper.to_dict()) == paper
    with pytest.raises(ConfigError, match="unknown preset 'new'"):
        AnyEditConfig.preset("new")
    with pytest.raises(ConfigError, match="unknown setting of AnyEdit 'windows'"):
        AnyEditConfig(**{}).from_dict({"windows": 3})


def test_logits_of_a_long_answer_are_never_all_there(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the activations, nothing grows with the answer."""
    from wise_ext.editing.suffix import SuffixEngine

    seen: list[int] = []
    logits = SuffixEngine.logits

    def watched(self: SuffixEngine, hidden: torch.Tensor, tokens: Any = None) -> torch.Tensor:
        seen.append(len(hidden))
        return logits(self, hidden, tokens)

    editor = _editor(load)
    monkeypatch.setattr(SuffixEngine, "logits", watched)
    target = " ".join(f"Stone {n} is laid beside stone {n + 1}." for n in range(12))
    editor.edit([Edit("wall", "How is the Bex wall made?", target)], False, "anyedit")
    count = len(load()[1](target).input_ids)
    assert count > 128 and max(seen) == 128 and sum(seen) >= 2 * count
    assert _answer(editor.model, load()[1], "How is the Bex wall made?").startswith("Stone 0 is")


def test_reset_forgets_everything(load: Any, tmp_path: Path) -> None:
    model, tokenizer = load()
    unedited = _answers(model, tokenizer, LONG)
    editor = Editor(model, tokenizer, WiseConfig(**QUICK), anyedit=PASSAGES)
    editor.edit(LONG[:2], progress=False, method="anyedit")
    editor.reset()
    editor.reset()
    assert _answers(model, tokenizer, LONG) == unedited and editor.ledger == []
    editor.edit(LONG[1:], progress=False, method="anyedit")
    assert _answers(model, tokenizer, LONG[1:]) == _told(LONG[1:])
    kept = _editor(load, tmp_path)
    with pytest.raises(ConfigError, match="undo its edits instead"):
        kept.reset()


def test_long_form_records_choose_anyedit(load: Any) -> None:
    editor = _editor(load)
    long = [Edit("z", "What does Zed sing?", "A short song.", is_long=True)]
    editor.edit(long, progress=False)
    editor.edit([*EDITS[:1], Edit("y", "What does Yan sing?", "Low.", is_long=True)], False)
    assert [entry["method"] for entry in editor.ledger] == ["anyedit", "wise", "wise"]
