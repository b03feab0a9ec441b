"""The harness that asks prompts as users write them: its routes, answers, figures and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import asked as prompts
from bench import asking, rows
from bench.addressed import key_only_memory
from bench.asked import Asked
from bench.asker import Asker, Found, Read, elsewhere_rows, kind_rows
from wise_ext import models
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.editor import Editor
from wise_ext.editing.edits import Edit, demo_edits
from wise_ext.errors import ConfigError, DataError

FACTS = {edit.id: edit for edit in demo_edits()}
ASKED = prompts.read_asked()


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(asking.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def tiny(model_dir: Path) -> tuple[Any, Any]:
    return models.load_model(str(model_dir), device="cpu")


def some(kind: str, case: str = "edit", form: str = "text") -> Asked:
    return next(a for a in ASKED if (a.kind, a.case, a.form) == (kind, case, form))


# -- keys without shards -------------------------------------------------------------------------

CROWD = [Edit(f"crowd-{i}", f"The {i}th door on the left opens with", "a key") for i in range(5)]


@pytest.fixture
def addressed(tiny: tuple[Any, Any]) -> Any:
    model, tokenizer = tiny
    slots: list[Sequence[Edit]] = [[edit] for edit in FACTS.values()]
    memory = key_only_memory(model, tokenizer, WiseConfig(), [*slots, CROWD])
    models.patch(model, memory)
    yield model, tokenizer, memory
    models.unload(model)


def test_every_edit_finds_its_own_shard_and_nothing_changes(addressed: Any) -> None:
    model, tokenizer, memory = addressed
    assert memory.edit_ids == [*FACTS, *(e.id for e in CROWD)]
    for edit in [*FACTS.values(), *CROWD]:
        ids = torch.tensor([prompts.encode_prompt(tokenizer, edit.prompt)])
        assert models.decide_routes(model, ids).route.tolist() == [memory.shard_of(edit.id)]
        edited = model(ids).logits
        with models.disabled(model):
            assert torch.equal(model(ids).logits, edited)


def test_keys_are_appended_to_a_memory(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    config = WiseConfig()
    facts = list(FACTS.values())
    memory = key_only_memory(model, tokenizer, config, [facts[:2]])
    assert key_only_memory(model, tokenizer, config, [facts[2:]], memory) is memory
    assert memory.shard_of(facts[-1].id) == 1
    assert memory.key_index is not None
    assert set(memory.key_index.ids) == FACTS.keys()
    with pytest.raises(ConfigError, match="router is 'indicator'"):
        key_only_memory(model, tokenizer, WiseConfig.preset("paper"), [facts])


# -- asking --------------------------------------------------------------------------------------


def test_routes_are_those_of_each_prompt_alone(addressed: Any) -> None:
    model, tokenizer, _ = addressed
    asked = [a for a in ASKED if a.kind in ("chat", "embedded")]
    found = list(Asker(model, tokenizer, 0).ask(asked))
    assert {f.asked.id for f in found} == {a.id for a in asked}
    for f in found:
        ids = torch.tensor([prompts.encode(tokenizer, f.asked)])
        assert models.decide_routes(model, ids).route.tolist() == [f.route]
        assert f.answer is None
    assert len({f.route for f in found}) > 2


def test_a_later_turn_meets_a_warm_cache(addressed: Any) -> None:
    model, tokenizer, _ = addressed
    seen: list[tuple[int, int]] = []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_key_values")
        seen.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))

    asked = some("later_turn", form="chat")
    handle = model.model.register_forward_pre_hook(watch, with_kwargs=True)
    (found,) = Asker(model, tokenizer, 4).ask([asked])
    handle.remove()
    first = torch.tensor([prompts.encode(tokenizer, asked)])
    assert seen[0] == (first.shape[1], 0)
    prefills = [entry for entry in seen[1:] if entry[0] > 1]
    assert len(prefills) == 1, "the second turn is prefilled in one go"
    new, past = prefills[0]
    assert past >= first.shape[1], "the first turn is not computed again"
    written = model.generate(
        first, attention_mask=torch.ones_like(first), max_new_tokens=12, do_sample=False
    )
    reply = tokenizer.decode(written[0, first.shape[1] :], skip_special_tokens=True).strip()
    assert past + new == len(prompts.encode(tokenizer, asked, reply))
    assert found.answer is not None


def test_generated_answers_are_those_of_generate(addressed: Any) -> None:
    model, tokenizer, _ = addressed
    asked = [some("bare"), some("chat", form="chat"), some("bare", "unrelated")]
    found = {f.asked.id: f for f in Asker(model, tokenizer, 5).ask(asked)}
    for a in asked[:2]:
        ids = torch.tensor([prompts.encode(tokenizer, a)])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert found[a.id].answer == text
    assert found[asked[2].id].answer is None


# -- figures -------------------------------------------------------------------------------------


def made_up(case: str, route: int, answer: str | None = None, *facts: str) -> Found:
    return Found(Asked("x", "two_facts", case, facts, "text", "?"), route, answer)


def test_figures_of_a_kind(addressed: Any) -> None:
    _, _, memory = addressed
    one, two = list(FACTS)[:2]
    found = [
        made_up("edit", 0, "It is the TARN OSK.", one, two),
        made_up("edit", 1, "1987", one, two),
        made_up("edit", 5, "no idea", one, two),
        made_up("edit", -1, "1987 or so", one, two),
        made_up("unrelated", -1),
        made_up("unrelated", 3),
        made_up("same_subject", 0),
    ]
    targets = {name: edit.target_new for name, edit in FACTS.items()}
    (row,) = kind_rows(found, memory, targets)
    assert row["kind"] == "two_facts"
    assert row["recall"] == {
        "edit": {
            "n": 4,
            "to_side": 0.75,
            "right_edit": 0.5,
            "right_later": 0.25,
            "contains": 0.75,
            "equal": 0.25,
        }
    }
    assert row["false_alarms"] == {
        "unrelated": {"n": 2, "share": 0.5},
        "same_subject": {"n": 1, "share": 1.0},
    }


def test_perplexities_are_over_all_tokens_of_a_kind(addressed: Any) -> None:
    model, tokenizer, _ = addressed
    texts = prompts.read_elsewhere()[:3]
    read = list(Asker(model, tokenizer, 1).read(texts))
    (row,) = elsewhere_rows(read)
    loss, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text.text)["input_ids"]])
        loss += float(model(ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert row["tokens"] == count
    expected = torch.tensor(loss / count).exp()
    assert row["perplexity_unedited"] == pytest.approx(float(expected), rel=1e-4)
    assert row["perplexity_edited"] == row["perplexity_unedited"], "the shards are empty"
    routed = elsewhere_rows([Read(texts[0], 2, 9, None, None), Read(texts[1], -1, 9, None, None)])
    assert routed[0]["to_main"] == 0.5
    assert routed[0]["perplexity_edited"] is None


# -- the command ---------------------------------------------------------------------------------


def test_a_run_that_trains_nothing(tmp_path: Path, model_dir: Path, addressed: Any) -> None:
    model, tokenizer, _ = addressed
    crowd = tmp_path / "crowd.jsonl"
    lines = [{"prompt": e.prompt, "target_new": e.target_new} for e in CROWD]
    crowd.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, details = tmp_path / "asking.jsonl", tmp_path / "details.jsonl"
    arguments = ["--model", model_dir, "--routing-only", "--json", out, "--details", details]
    crowded = ["--crowd", crowd, "--crowd-size", len(CROWD)]
    status, output = command(*arguments, *crowded, "--kind", "chat", "--no-elsewhere")
    assert status == 0, output
    assert "false alarms" in output
    (row,) = rows.read(out)
    assert (row["mode"], row["crowd"], row["kind"]) == ("routing", 5, "chat")
    assert row["settings"]["radius"] == WiseConfig().radius
    assert {"device", "command", "commit", "torch", "threads"} <= row["machine"].keys()

    # The same, counted one prompt at a time.
    routes = {}
    for a in [a for a in ASKED if a.kind == "chat"]:
        ids = torch.tensor([prompts.encode(tokenizer, a)])
        routes[a.id] = int(models.decide_routes(model, ids).route)
    order = list(FACTS)
    positives = [a for a in ASKED if a.kind == "chat" and a.facts]
    right = sum(routes[a.id] == order.index(a.facts[0]) for a in positives)
    assert row["recall"]["edit"]["right_edit"] == pytest.approx(right / 24, rel=1e-5)
    assert row["recall"]["edit"]["contains"] is None
    near = [a for a in ASKED if a.kind == "chat" and a.case == "same_subject"]
    share = sum(routes[a.id] >= 0 for a in near) / len(near)
    assert row["false_alarms"]["same_subject"]["share"] == pytest.approx(share, rel=1e-5)
    written = {r["id"]: r["route"] for r in rows.read(details)}
    assert written == routes


LIGHT = {"iterations": 1, "contexts": 0, "contexts_per_round": 0}


def test_a_run_that_edits(tmp_path: Path, model_dir: Path) -> None:
    out = tmp_path / "asking.jsonl"
    settings = [word for name, value in LIGHT.items() for word in ("--set", f"{name}={value}")]
    kinds = ["--kind", "bare", "--max-new-tokens", 2, "--no-elsewhere"]
    status, output = command("--model", model_dir, "--json", out, *settings, *kinds)
    assert status == 0, output
    (row,) = rows.read(out)
    assert (row["mode"], row["crowd"], row["settings"]["iterations"]) == ("edited", 0, 1)
    assert row["recall"]["edit"]["to_side"] == 1.0
    assert row["recall"]["edit"]["right_edit"] == 1.0
    assert 0.0 <= row["recall"]["edit"]["contains"] <= 1.0


def test_a_run_on_a_saved_memory(tmp_path: Path, model_dir: Path) -> None:
    crowd, out = tmp_path / "crowd.jsonl", tmp_path / "asking.jsonl"
    lines = [{"prompt": e.prompt, "target_new": e.target_new} for e in CROWD]
    crowd.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, tokenizer = models.load_model(str(model_dir), device="cpu")
    editor = Editor(model, tokenizer, WiseConfig(**LIGHT), directory=tmp_path / "whole")
    editor.edit(list(FACTS.values()), progress=False)
    common = ["--model", model_dir, "--json", out, "--kind", "later_turn", "--no-elsewhere"]
    crowded = ["--crowd", crowd, "--crowd-size", len(CROWD), "--max-new-tokens", 2]
    status, output = command(*common, *crowded, "--memory", tmp_path / "whole")
    assert status == 0, output
    (row,) = rows.read(out)
    assert (row["mode"], row["crowd"], row["settings"]["iterations"]) == ("edited", 5, 1)
    assert row["recall"].keys() == {"edit", "edit_after_edit"}
    assert row["recall"]["edit"]["contains"] is not None

    editor.undo(next(iter(FACTS)))
    status, output = command(*common, "--memory", tmp_path / "whole")
    assert status == 1
    assert "lacks the demo fact 'velmora-bridge'" in " ".join(output.split())


def test_what_cannot_be_run(tmp_path: Path, model_dir: Path) -> None:
    out = tmp_path / "asking.jsonl"
    model = ["--model", model_dir, "--json", out]
    for arguments, complaint in (
        (["--kind", "sung"], "unknown kind 'sung'"),
        (["--set", "radius"], "write NAME=VALUE"),
        (["--memory", tmp_path, "--routing-only"], "no memory|not a memory|leave out"),
        (["--set", "router=indicator", "--routing-only"], "only keys can be stored"),
    ):
        status, output = command(*model, *arguments)
        assert status == 1, arguments
        assert any(part in output for part in complaint.split("|")), output
    assert not out.exists()


def test_a_crowd_that_is_too_small(tmp_path: Path) -> None:
    crowd = tmp_path / "crowd.jsonl"
    crowd.write_text(json.dumps({"prompt": "A door is", "target_new": "open"}) + "\n")
    assert [e.id for e in asking.read_crowd([crowd], 1)] == ["crowd-0"]
    with pytest.raises(DataError, match="hold 1 edits, not 2"):
        asking.read_crowd([crowd], 2)
