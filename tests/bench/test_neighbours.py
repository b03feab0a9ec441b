"""Hard locality by addresses: what is stored, what is asked, and the shares that come of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import neighbours, rows
from bench.neighbours import Neighbourhood, measure, read
from wise_ext import models
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.workshop import Workshop
from wise_ext.errors import DataError


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(neighbours.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def shop(model_dir: Path) -> Workshop:
    config = WiseConfig(layer=2, contexts=0, contexts_per_edit=0, contexts_per_round=0)
    return Workshop(*models.load_model(str(model_dir), device="cpu"), config)


def test_our_facts_have_both_forms_and_name_their_subjects(tmp_path: Path) -> None:
    ours = read("ours", tmp_path, 99)
    assert len(ours) == 60
    for fact in ours:
        assert fact.subject is not None and len(fact.inside) == len(fact.outside) == 2
        texts = [fact.prompt, *fact.outside]
        assert all(fact.subject.lower() in text.lower() for text in texts), fact
    asked = [text for fact in ours for text in (fact.prompt, *fact.inside)]
    assert 0.2 < sum(text.endswith("?") for text in asked) / len(asked) < 0.8


def test_shares_are_those_of_single_questions(shop: Workshop, tmp_path: Path) -> None:
    stored = read("ours", tmp_path, 6)
    radii, leads = [0.4, 0.6], [0.5, 2.0]
    made = measure(shop, stored, radii, leads)
    assert [(r["radius"], r["lead"]) for r in made] == [(a, b) for a in radii for b in leads]
    index = shop.empty_memory().key_index
    assert index is not None
    for i, n in enumerate(stored):
        keys = shop.coach.addresses(n.prompt, n.subject)
        index.add(keys, [i] * len(keys), [str(i)] * len(keys))
    for row in made:
        found = {}
        for text in (text for n in stored for text in (*n.inside, *n.outside)):
            asked = shop.coach.keys([text], [None])
            entry = int(index.find(asked, row["radius"], row["lead"])[0])
            found[text] = int(index.ids[entry]) if entry >= 0 else -1
        inside = [(found[text], i) for i, n in enumerate(stored) for text in n.inside]
        outside = [found[text] for n in stored for text in n.outside]
        assert row["in"] == pytest.approx(sum(f >= 0 for f, _ in inside) / len(inside))
        assert row["right"] == pytest.approx(sum(f == i for f, i in inside) / len(inside))
        assert row["out"] == pytest.approx(sum(f < 0 for f in outside) / len(outside))
        assert row["out_other"] == row["out"]
    assert len({(r["in"], r["out"]) for r in made}) > 1


def test_neighbours_that_ask_for_the_edited_fact_are_told_apart(
    shop: Workshop, tmp_path: Path
) -> None:
    record = {"target_new": "Ann", "rephrase_prompt": "Lumo is by", "subject": "Lumo"}
    asked = [
        ("Who made Lumo?", "Who made Lumo?", ["Bo"], "Bo"),
        ("What is Lumo by?", "What is Lumo by?", "Bo", " bo, Cy"),
        ("Who owns Lumo?", "The colour of Lumo is", ["Bo"], "red"),
        ("Who sells Lumo?", "The seller of Pika is", ["Bo"], "Bo"),
        ("Who buys Lumo?", "The buyer of Lumo is", None, "Bo"),
    ]
    names = ("prompt", "locality_prompt", "ground_truth", "locality_ground_truth")
    records = [{**record, **dict(zip(names, row, strict=True))} for row in asked]
    (tmp_path / "zsre_knowedit_extra.json").write_text(json.dumps(records))
    stored = read("extra", tmp_path, 9)
    assert [n.mislabelled for n in stored] == [True, True, False, False, False]
    (row,) = measure(shop, stored, [0.99], [3.0])
    assert (row["neighbours"], row["other"]) == (5, 3)
    assert row["out"] == pytest.approx(0.6) and row["out_other"] == 1.0


def test_edits_themselves_are_found(shop: Workshop) -> None:
    stored = [Neighbourhood(f"Where was {n} born?", n, [f"Where was {n} born?"], []) for n in "XY"]
    (row,) = measure(shop, stored, [0.5], [0.7])
    assert row["in"] == row["right"] == 1.0 and row["neighbours"] == 0


def test_the_command_appends_its_rows(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    record = {"id": "a", "prompt": "Who made Lumo?", "target_new": "Ann", "subject": "Lumo"}
    record |= {"rephrase_prompt": "Lumo was made by", "locality_prompt": "Where is Lumo?"}
    (tmp_path / "counterfact.jsonl").write_text(json.dumps(record) + "\n")
    options = ["--model", model_dir, "--json", out, "--data", tmp_path, "--lead", 2]
    status, said = command("--dataset", "counterfact", "--dataset", "ours", *options)
    assert status == 0 and "neighbours out" in said
    made = rows.read(out)
    assert [(r["dataset"], r["edits"]) for r in made] == [("counterfact", 1), ("ours", 60)]
    assert all(r["radius"] == WiseConfig().radius and r["machine"]["command"] for r in made)
    status, said = command("--dataset", "zsre", *options)
    assert status == 1 and "no zsre_wise_edit" in said
    assert rows.read(out) == made
    with pytest.raises(DataError, match="unknown data set 'nobody'"):
        read("nobody", tmp_path, 1)
