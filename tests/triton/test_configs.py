"""The tables of launch configurations: read, checked, and chosen from."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed, so there are no Triton kernels")

from wise_ext.triton_kernels import configs

TABLES = ("sm80", "sm90", "interpreter")
CPU = torch.device("cpu")


def entry(max_rows=None, **changes):
    blocks = {"BLOCK_ROWS": 16, "BLOCK_OUT": 32}
    return {
        "max_rows": max_rows,
        "blocks": blocks,
        "num_warps": 4,
        "num_stages": 2,
    } | changes


@pytest.fixture
def written(tmp_path):
    def write(entries):
        path = tmp_path / "sm90.json"
        path.write_text(json.dumps({"provenance": {}, "ops": {"side_norm": {"bf16": entries}}}))
        return path

    return write


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_valid_and_have_the_same_ops_and_dtypes(name):
    table = configs.read_table(configs.TABLES / f"{name}.json")
    other = configs.read_table(configs.TABLES / "interpreter.json")
    assert {op: set(keys) for op, keys in table.items()} == {
        op: set(keys) for op, keys in other.items()
    }
    for dtypes in table.values():
        assert set(dtypes) in ({"fp32"}, {"fp32", "bf16", "fp16"})


@pytest.mark.parametrize("name", TABLES)
def test_tables_say_where_they_are_from(name):
    text = (configs.TABLES / f"{name}.json").read_text(encoding="utf-8")
    provenance = json.loads(text)["provenance"]
    assert provenance["note"]
    for measured in provenance["measured"].values():
        assert measured.keys() >= {"gpu", "driver", "triton", "commit", "command"}


def test_the_first_entry_that_is_large_enough_is_picked(monkeypatch, written):
    path = written([entry(8), entry(64, num_warps=8), entry(num_warps=2)])
    table = configs.read_table(path)
    monkeypatch.setattr(configs, "_load", lambda name: table)
    configs._entries.cache_clear()
    picked = [configs.pick("side_norm", "bf16", n, CPU).num_warps for n in (0, 8, 9, 64, 65, 10**9)]
    assert picked == [4, 4, 8, 8, 2, 2]
    with pytest.raises(ValueError, match="no entry for side_norm in fp16"):
        configs.pick("side_norm", "fp16", 1, CPU)
    configs._entries.cache_clear()


def test_a_config_launches():
    config = configs.pick("side_norm", "fp32", 5, CPU)
    assert config is configs.pick("side_norm", "fp32", 6, CPU)
    assert config.launch.items() >= {**config.blocks, "num_warps": config.num_warps}.items()
    assert hash(config) and config in configs.every("side_norm", "fp32", "interpreter")


def test_every_names_each_config_once():
    table = configs.read_table(configs.TABLES / "sm90.json")
    for op, dtypes in table.items():
        for key, entries in dtypes.items():
            found = configs.every(op, key, 90)
            assert {config for _, config in entries} == set(found)
            assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("capability", "table"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm90"), ((12, 0), "sm80")],
)
def test_the_architecture_decides_the_table(capability, table):
    assert configs.architecture(capability) == table


def test_older_cards_and_other_devices_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"need compute capability 8\.0 or newer, got 7\.5"):
        configs.architecture((7, 5))
    monkeypatch.setattr(configs, "INTERPRETED", False)
    with pytest.raises(ValueError, match="need a CUDA device, got xpu"):
        configs.pick("side_norm", "fp32", 1, torch.device("xpu", 0))


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([], "the last entry's max_rows must be null"),
        ([entry(8)], "the last entry's max_rows must be null"),
        ([entry(8), entry(8), entry()], "max_rows must rise"),
        ([entry(0), entry()], "max_rows must rise"),
        ([entry("8"), entry()], "max_rows must rise"),
        ([entry(blocks={"BLOCK_ROWS": 48})], "BLOCK_ROWS must be a power of two, got 48"),
        ([entry(num_warps=3)], "num_warps must be a power of two, got 3"),
        ([entry(num_stages=0)], "num_stages must be a positive integer, got 0"),
        ([entry(num_stages=True)], "num_stages must be a positive integer, got True"),
        ([{"max_rows": None}], "no 'blocks'"),
        ({"max_rows": None}, "string indices"),
        (None, "not iterable"),
    ],
)
def test_a_malformed_table_says_where_in_one_line(written, entries, complaint):
    path = written(entries)
    with pytest.raises(ValueError, match=r"sm90\.json is not a valid table: ") as raised:
        configs.read_table(path)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ops": 3}', "{"])
def test_no_table_at_all(tmp_path, text):
    path = tmp_path / "sm90.json"
    with pytest.raises(ValueError, match="there is no table"):
        configs.read_table(path)
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a valid table"):
        configs.read_table(path)
