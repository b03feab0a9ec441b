"""Editors side by side on a tiny model: rows, regimes, what is not measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wise_ext import Edit
from wise_ext.errors import ConfigError
from wise_ext.evaluation.comparing import Comparing, compare
from wise_ext.models import is_patched

EDITS = [
    Edit(
        "moss",
        "How does the Harl moss clock work?",
        "At dawn the moss drinks and tips a copper cup.",
        rephrase_prompt="What makes the Harl moss clock go?",
        sub_question=("What does the cup consist of?",),
        sub_answer=("copper",),
        is_long=True,
    ),
    Edit("ferry", "Recite the poem of the Bex ferry.", "Row, Bex, row, the river is slow."),
]
QUICK: dict[str, Any] = {
    "layer": 2,
    "contexts": 0,
    "contexts_per_edit": 0,
    "contexts_per_round": 0,
    "chat_context": False,
    "shortened": 0,
    "reworded": 0,
    "learning_rate": 0.05,
}
SETTINGS = {
    "anyedit": QUICK,
    "wise": QUICK,
    "ft-l": {"layer": 2, "steps": 60, "learning_rate": 0.05, "norm_constraint": 0.0},
}


@pytest.fixture(scope="module")
def tiny(model_dir: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return AutoModelForCausalLM.from_pretrained(model_dir).eval(), tokenizer


def _what(*methods: str, **more: Any) -> Comparing:
    settings = {"similarity": False, "unrelated": 6, "settings": SETTINGS} | more
    return Comparing(methods=methods, **settings)


@pytest.mark.parametrize("regime", ["each", "sequence"])
def test_a_row_a_method_and_the_model_as_it_was(tiny: tuple[Any, Any], regime: str) -> None:
    model, tokenizer = tiny
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    names = ("unedited", "anyedit", "wise", "ft-l")
    rows = []
    for row in compare(model, tokenizer, EDITS, _what(*names, regime=regime), progress=False):
        rows.append(row)
        assert not is_patched(model)
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert [row["method"] for row in rows] == list(names)
    unedited, anyedit, wise, tuned = rows
    for row in rows:
        assert (row["regime"], row["edits"], row["n"]) == (regime, 2, 2)
        assert row["cpu_seconds"] == pytest.approx(sum(row["stages"].values()))
    assert unedited["locality"] == 1.0 and unedited["rouge_l"]["original"] < 0.5
    assert anyedit["exact"]["original"] == anyedit["rouge_l"]["original"] == 1.0
    assert anyedit["locality"] == 1.0 and anyedit["iterations"] >= 1
    assert wise["exact"]["original"] == 1.0
    assert tuned["rouge_l"]["original"] > unedited["rouge_l"]["original"]
    assert tuned["locality"] < 1.0 and {"optimise", "other"} <= tuned["stages"].keys()
    assert anyedit["sub_question"]["contains"] is not None
    assert len({row["digest"] for row in rows}) == 4


def test_what_is_known_is_not_measured_again(tiny: tuple[Any, Any]) -> None:
    what = _what("anyedit")
    (row,) = compare(*tiny, EDITS, what, progress=False)
    known = row | {"locality": "from before"}
    (again,) = compare(*tiny, EDITS, what, [known], progress=False)
    assert again is known
    (other,) = compare(*tiny, EDITS[:1], what, [known], progress=False)
    assert other["digest"] != row["digest"] and other["n"] == 1


def test_an_edit_that_another_supersedes_is_left_out(tiny: tuple[Any, Any]) -> None:
    newer = Edit("newer", EDITS[1].prompt, "No poem.")
    (row,) = compare(*tiny, [EDITS[1], newer], _what("anyedit"), progress=False)
    assert row["edits"] == 1 and row["exact"]["original"] == 1.0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unknown method 'mend': choose among unedited, wise"):
        Comparing(methods=("mend",))
    with pytest.raises(ConfigError, match="unknown method 'ft'"):
        Comparing(methods=("wise",), settings={"ft": {}})
    with pytest.raises(ConfigError, match="unknown setting 'radius': choose among layer, chat"):
        Comparing(methods=("ft-l",), settings={"ft-l": {"radius": 1.0}})
    with pytest.raises(ConfigError, match="cue is '2': give a number"):
        Comparing(methods=("wise",), settings={"wise": {"cue": "2"}})
    with pytest.raises(ConfigError, match="margin is a setting of anyedit, not of wise"):
        Comparing(methods=("wise",), settings={"wise": {"anyedit.margin": 1.0}})
    with pytest.raises(ConfigError, match="regime is 'batch'"):
        Comparing(methods=("wise",), regime="batch")
