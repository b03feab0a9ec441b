"""What a patched model costs: made-up memories, the checks before the clock, rows and figure."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import overhead, overhead_plot
from bench.made_memory import Made, Maker, made_shards
from bench.overhead_peer import PeerAdapters, check
from tests.bench import fake_easyedit
from wise_ext.models import is_patched, layer_path, load_model, patch, unload


@pytest.fixture
def tiny(model_dir: Path) -> tuple[Any, Any]:
    model, tokenizer = load_model(str(model_dir))
    return model, tokenizer


# A random model's first block mixes what it reads: names are found less surely than by a real one.
LOOSE = {"radius": 0.27, "lead": 3.0}


@pytest.fixture
def made(tiny: tuple[Any, Any]) -> Made:
    return Maker(*tiny, shard_size=3, **LOOSE).make(2)


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(overhead.main)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


def test_a_made_memory_knows_its_questions(tiny: tuple[Any, Any], made: Made) -> None:
    index = made.memory.key_index
    assert index is not None and len(set(index.ids)) == len(made.prompts) == 6
    assert len(set(made.prompts)) == 6
    assert [made.memory.shard_of(f"made-{n}") for n in range(6)] == [0, 0, 0, 1, 1, 1]
    assert all(abs(shard.density - 0.2) < 0.02 for shard in made.memory.shards)
    again = Maker(*tiny, shard_size=3).make(2)
    assert again.prompts == made.prompts
    for one, other in zip(again.memory.shards, made.memory.shards, strict=True):
        assert one.values.equal(other.values) and one.mask_bits.equal(other.mask_bits)


def test_a_larger_memory_begins_with_the_smaller(tiny: tuple[Any, Any], made: Made) -> None:
    maker = Maker(*tiny, shard_size=3)
    assert maker.make(1).prompts == made.prompts[:3]
    assert maker.make(2).prompts == made.prompts


def test_no_two_shards_share_a_mask() -> None:
    masks = [shard.mask_bits for shard in made_shards((12, 40), 9, 0.2)]
    assert not any(a.equal(b) for i, a in enumerate(masks) for b in masks[:i])


def test_a_twin_has_the_very_same_tensors(tiny: tuple[Any, Any], made: Made) -> None:
    model, _ = tiny
    bare = overhead.twin(model)
    patch(model, made.memory)
    assert is_patched(model) and not is_patched(bare)
    unload(model)
    theirs = {p.data_ptr() for p in bare.parameters()}
    assert theirs == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("routed", overhead.ROUTED)
def test_the_check_knows_where_rows_should_go(
    tiny: tuple[Any, Any], made: Made, routed: str
) -> None:
    model, tokenizer = tiny
    bare, case = overhead.twin(model), overhead.Case("prefill", 40, 4, routed)
    ids = overhead.prompts(case, made.prompts, tokenizer)
    assert ids.shape == (4, 40)
    patch(model, made.memory)
    with torch.no_grad():
        overhead.check(model, bare, ids, case, made)
        other = overhead.Case("prefill", 40, 4, "all" if routed != "all" else "none")
        with pytest.raises(overhead.WrongError, match=r"row \d went to"):
            overhead.check(model, bare, ids, other, made)


def test_the_check_sees_a_bit(tiny: tuple[Any, Any], made: Made) -> None:
    model, tokenizer = tiny
    bare, case = overhead.twin(model), overhead.Case("prefill", 20, 1, "none")
    ids = overhead.prompts(case, made.prompts, tokenizer)
    patch(model, made.memory)
    bare.get_output_embeddings().weight = torch.nn.Parameter(
        bare.get_output_embeddings().weight * (1 + 1e-6)
    )
    with torch.no_grad(), pytest.raises(overhead.WrongError, match="not what the bare model says"):
        overhead.check(model, bare, ids, case, made)


def test_in_pairs_is_the_ratio_of_two_costs() -> None:
    a = torch.randn(200, 200)

    def times(count: int) -> None:
        for _ in range(count):
            a @ a

    row = overhead.in_pairs(lambda: times(60), lambda: times(20), 9)
    assert 2 < row["ratio"] < 4.5 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_rows(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    options: list[object] = ["--model", model_dir, "--json", out, "--pairs", 3]
    options += ["--shards", 1, "--shards", 2, "--prefill", 48, "--decode", 2, "--layer", "tiny"]
    monkeypatch.setattr(overhead, "Maker", partial(Maker, shard_size=3))
    # Of a random model's prompts not all find their edit; that they are checked is tested above.
    checked = []
    monkeypatch.setattr(overhead, "wrong_route", lambda *_: "")
    monkeypatch.setattr(overhead, "check", lambda *given: checked.append(given))
    code, text = command(*options)
    assert code == 0, text
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    told = [(r["phase"], r["shards"], r["routed"]) for r in rows]
    assert ("prefill", 2, "all") in told and ("decode", 1, "half") in told
    assert ("layer", 2, "half") in told and ("layer and routing", 2, "none") in told
    assert ("prefill", 1, "half") not in told
    assert len(checked) == sum(not r["phase"].startswith("layer") for r in rows)
    assert all(r["ratio"] > 0 and r["bare_ms"] > 0 for r in rows)
    assert all(r["bank_bytes"] < r["dense_bytes"] for r in rows if r["shards"])
    figures = overhead_plot.figures(rows)
    assert set(figures) == {"overhead-key"}


def test_the_indicator_router_is_measured_where_nothing_is_routed(
    model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    options: list[object] = ["--model", model_dir, "--json", out, "--pairs", 3, "--layer", "tiny"]
    code, text = command(*options, "--router", "indicator", "--shards", 2, "--decode", 1)
    assert code == 0, text
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {r["routed"] for r in rows} == {"none"} and {r["router"] for r in rows} == {"indicator"}


def test_easyedits_adapter_is_measured_beside(model_dir: Path, tmp_path: Path) -> None:
    out, clone = tmp_path / "rows.jsonl", fake_easyedit.write(tmp_path / "clone")
    options: list[object] = ["--model", model_dir, "--json", out, "--pairs", 3, "--only", "model"]
    options += ["--shards", 2, "--prefill", 20, "--decode", 1, "--routed", "none"]
    code, text = command(*options, "--easyedit", clone)
    assert code == 0, text
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    theirs = [row for row in rows if row["router"] == "easyedit"]
    assert [(row["phase"], row["shards"]) for row in theirs] == [("prefill", 2), ("decode", 2)]
    assert {"overhead-key", "overhead-easyedit"} == set(overhead_plot.figures(rows))
    code, text = command(*options, "--easyedit", tmp_path)
    assert code == 1 and "name the folder of a clone" in text


def test_an_adapter_goes_where_its_thresholds_say(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = tiny
    bare, layer = overhead.twin(model), layer_path(model)
    base, ids = model.get_submodule(layer), torch.tensor([[5, 6, 7]])
    peers = PeerAdapters(fake_easyedit.write(tmp_path))
    for routed in (False, True):
        with peers.attached(model, layer, 3, routed):
            assert model.get_submodule(layer) is not base
            assert check(model, bare, ids, routed) and not check(model, bare, ids, not routed)
        assert model.get_submodule(layer) is base


def test_a_prompt_that_goes_astray_is_replaced(
    tiny: tuple[Any, Any], made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    bare, case = overhead.twin(model), overhead.Case("prefill", 20, 1, "none")
    patch(model, made.memory)
    said = iter(["row 0 went to 1, not -1", "row 0 went to 0, not -1", ""])
    monkeypatch.setattr(overhead, "wrong_route", lambda *_: next(said, ""))
    ids = overhead.asked(model, bare, case, made, tokenizer)
    assert torch.equal(ids, overhead.prompts(case, made.prompts, tokenizer, start=80))
    monkeypatch.setattr(overhead, "wrong_route", lambda *_: "row 0 went to 1, not -1")
    with pytest.raises(overhead.WrongError, match="row 0 went to 1"):
        overhead.asked(model, bare, case, made, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--routed", "some"], "there is no 'some': choose from none, half, all"),
        (["--router", "other"], "there is no 'other': choose from key, indicator"),
        (["--layer", "huge"], "there is no 'huge'"),
        (["--model", "nowhere/at/all.gguf"], "nowhere/at/all.gguf"),
    ],
)
def test_bad_options_get_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    code, text = command(*options, "--json", tmp_path / "rows.jsonl")
    assert code == 1 and message in text
    assert not (tmp_path / "rows.jsonl").exists()
