from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wise_ext.errors import StorageError
from wise_ext.memory import Shard, random_mask_bits
from wise_ext.storage import check_base, load_memory_dir, save_memory
from wise_ext.storage import encoding as encoding_module
from wise_ext.storage.commit import CONFIG, FILES, LEDGER, TENSORS
from wise_ext.storage.files import Content, map_file

MakeExample = Callable[..., Any]


def _same(stored: Any, example: Any) -> bool:
    old, new = example.memory.state_tensors(), stored.memory.state_tensors()
    return (
        stored.memory.state_meta() == example.memory.state_meta()
        and old.keys() == new.keys()
        and all(old[name].equal(new[name]) for name in old)
        and stored.config == example.config
        and stored.ledger == example.ledger
        and stored.base == example.base
    )


@pytest.mark.parametrize("options", [{}, {"shards": 0}, {"keyed": False}, {"shards": 5}])
def test_what_is_saved_is_loaded(
    make_example: MakeExample, tmp_path: Path, options: dict[str, Any]
) -> None:
    example = make_example(**options)
    example.save(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(FILES)
    assert _same(load_memory_dir(tmp_path / "a" / "b"), example)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc\u2028\n", max_size=3), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(json_values, json_values, st.integers(0, 4), st.booleans())
def test_any_settings_and_ledger_round_trip_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, setting: Any, field: Any, shards: int, keyed: bool
) -> None:
    from wise_ext.memory import SideMemory

    memory = SideMemory("layer", (3, 9), routing="indicator")
    ledger = [{"id": str(i), "field": field} for i in range(shards)]
    places = [tmp_path_factory.mktemp("memory") for _ in range(2)]
    for place in places:
        save_memory(place, memory, {"setting": setting, "keyed": keyed}, ledger, {"name": "m"})
    for name in FILES:
        assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes()
    stored = load_memory_dir(places[0])
    assert stored.config == {"setting": setting, "keyed": keyed}
    assert stored.ledger == ledger


def test_same_memory_same_bytes(make_example: MakeExample, tmp_path: Path) -> None:
    for name in "ab":
        make_example().save(tmp_path / name)
    # A loaded memory saves as it was.
    stored = load_memory_dir(tmp_path / "a")
    save_memory(tmp_path / "c", stored.memory, stored.config, stored.ledger, stored.base)
    for name in FILES:
        contents = {(tmp_path / place / name).read_bytes() for place in "abc"}
        assert len(contents) == 1
    assert stored.checksum == load_memory_dir(tmp_path / "b").checksum
    make_example(1).save(tmp_path / "d")
    assert stored.checksum != load_memory_dir(tmp_path / "d").checksum


def test_half_precision_is_stored_as_it_is(make_example: MakeExample, tmp_path: Path) -> None:
    example = make_example()
    for shard in example.memory.shards:
        shard.values = shard.values.bfloat16()
    example.save(tmp_path)
    loaded = load_memory_dir(tmp_path).memory
    assert loaded.shards[0].values.dtype == torch.bfloat16
    assert loaded.shards[0].values.equal(example.memory.shards[0].values)


def test_every_byte_counts(example: Any, tmp_path: Path) -> None:
    example.save(tmp_path)
    for name in FILES:
        path = tmp_path / name
        data = path.read_bytes()
        # All bytes of a header, a sample of the rest.
        places = [*range(0, len(data), max(1, len(data) // 300)), *range(40), len(data) - 1]
        for place in places:
            for flip in (1, 0x20):
                changed = bytearray(data)
                changed[place] ^= flip
                path.write_bytes(changed)
                with pytest.raises(StorageError, match=r"wise_config|side_memory|edits|version"):
                    load_memory_dir(tmp_path)
        for cut in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            with pytest.raises(StorageError, match=name):
                load_memory_dir(tmp_path)
        path.write_bytes(data + b"\n")
        with pytest.raises(StorageError, match=name):
            load_memory_dir(tmp_path)
        path.unlink()
        with pytest.raises(StorageError, match=f"{name} is missing in"):
            load_memory_dir(tmp_path)
        path.write_bytes(data)
    assert _same(load_memory_dir(tmp_path), example)


def test_messages_name_file_cause_and_cure(example: Any, tmp_path: Path) -> None:
    example.save(tmp_path)
    tensors = tmp_path / TENSORS
    data = tensors.read_bytes()
    tensors.write_bytes(data[:-3])
    with pytest.raises(
        StorageError,
        match=rf"{TENSORS} in .* has {len(data) - 3} bytes instead of {len(data)}.*restore it",
    ):
        load_memory_dir(tmp_path)
    tensors.write_bytes(data)
    (tmp_path / LEDGER).write_bytes((tmp_path / LEDGER).read_bytes().replace(b"sky", b"sea"))
    with pytest.raises(StorageError, match=rf"{LEDGER} in .* was altered"):
        load_memory_dir(tmp_path)
    with pytest.raises(StorageError, match="there is no such folder"):
        load_memory_dir(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="it is not a memory directory"):
        load_memory_dir(tmp_path / "empty")
    with pytest.raises(StorageError, match="there is no such folder"):
        load_memory_dir(tmp_path / LEDGER)


def test_another_format_version_is_refused(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_module, "FORMAT_VERSION", 7)
    monkeypatch.setattr(encoding_module, "__version__", "9.9")
    example.save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(StorageError, match=r"format version 7, .* reads version 6: .*\(9\.9\)"):
        load_memory_dir(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"format": "other"}', "\x00", "ÿ", "[" * 5000])
def test_a_stranger_in_place_of_the_configuration(example: Any, tmp_path: Path, text: str) -> None:
    example.save(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(StorageError, match=CONFIG):
        load_memory_dir(tmp_path)


def test_contents_that_do_not_fit_are_refused(
    example: Any, make_example: MakeExample, tmp_path: Path
) -> None:
    def store(**changes: Any) -> None:
        tensors = example.memory.state_tensors() | changes.get("tensors", {})
        meta = example.memory.state_meta() | changes.get("meta", {})
        files = {
            TENSORS: changes.get("bytes") or encoding_module.encode_tensors(tensors),
            LEDGER: changes.get("ledger", b""),
        }
        head = encoding_module.encode_config({}, meta, {}, files[TENSORS], files[LEDGER])
        for name, data in (files | {CONFIG: head}).items():
            (tmp_path / name).write_bytes(data)

    store()
    assert load_memory_dir(tmp_path).ledger == []
    for message, changes in (
        ("inconsistent: .*values", {"tensors": {"bank.values": torch.zeros(3)}}),
        ("inconsistent: lacks 'seed'", {"meta": {"shards": [{"edit_ids": []}] * 2}}),
        ("inconsistent: unknown router", {"meta": {"routing": "oracle"}}),
        ("not a whole safetensors file", {"bytes": b"\x08\0\0\0\0\0\0\0notjson!"}),
        ("not a whole safetensors file", {"bytes": pickle.dumps({"bank.values": 1})}),
        ("line 2: was altered", {"ledger": b'{"id": "a"}\n[1]\n'}),
    ):
        store(**changes)
        with pytest.raises(StorageError, match=message):
            load_memory_dir(tmp_path)


def test_loading_never_unpickles(example: Any, tmp_path: Path) -> None:
    example.save(tmp_path)
    program = (
        "import sys, pickle\n"
        "import torch\n"
        "def refuse(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse\n"
        "from wise_ext.storage import load_memory_dir, verify\n"
        "stored = load_memory_dir(sys.argv[1])\n"
        "assert all(check.ok for check in verify(sys.argv[1]))\n"
        "print(len(stored.ledger))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", "\ud800"])
def test_values_without_a_json_form(
    example: Any, make_example: MakeExample, tmp_path: Path, value: object
) -> None:
    example.save(tmp_path)
    other = make_example(1)
    other.config["odd"] = value
    with pytest.raises(StorageError, match="cannot be stored as JSON"):
        other.save(tmp_path)
    with pytest.raises(StorageError, match="cannot be stored as JSON"):
        other.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert _same(load_memory_dir(tmp_path), example)


def test_numbers_as_keys_read_back_as_text(example: Any, tmp_path: Path) -> None:
    example.config = {"counts": {10: 1, 9: 2}}
    example.save(tmp_path)
    assert load_memory_dir(tmp_path).config == {"counts": {"10": 1, "9": 2}}


def test_other_files_are_left_alone(example: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    example.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    text = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert text["base"] == {"fingerprint": "abc0", "name": "tiny"}
    assert len((tmp_path / LEDGER).read_bytes().splitlines()) == 4


def test_a_memory_of_another_base_model_is_refused() -> None:
    stored = {"name": "tiny", "fingerprint": "abc"}
    check_base(stored, "abc", "tiny")
    check_base(stored, "abc", "/moved/tiny")
    with pytest.raises(StorageError, match=r"made for 'tiny' \[abc\], this model is 'big' \[xyz\]"):
        check_base(stored, "xyz", "big")
    with pytest.raises(StorageError, match="of the same name, but with other weights"):
        check_base(stored, "xyz", "tiny")


def test_a_save_between_two_reads_is_waited_out(
    example: Any, make_example: MakeExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wise_ext.storage import directory

    example.save(tmp_path)
    newer = make_example(1)
    real = directory.read_file
    pending = [newer]

    def read(folder: Path, name: str) -> Content:
        if name == TENSORS and pending:
            pending.pop().save(tmp_path)
        return real(folder, name)

    monkeypatch.setattr(directory, "read_file", read)
    assert _same(load_memory_dir(tmp_path), newer)


def test_tensors_lie_where_the_file_is_mapped(make_example: MakeExample, tmp_path: Path) -> None:
    """Loading copies nothing, and a bank of the stored dtype is the file's own pages."""
    make_example(shards=3).save(tmp_path)
    memory = load_memory_dir(tmp_path).memory
    bank, again = memory.bank(), memory.bank()
    first, second, third = (shard.values for shard in memory.shards)
    assert first.untyped_storage().data_ptr() == third.untyped_storage().data_ptr()
    assert bank.values.data_ptr() == first.data_ptr() == again.values.data_ptr()
    assert bank.mask_bits.data_ptr() == memory.shards[0].mask_bits.data_ptr()
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    half = memory.bank(torch.bfloat16)
    assert half.values.equal(bank.values.bfloat16())
    assert memory.bank().values.data_ptr() == bank.values.data_ptr()


def test_24_shards_take_a_quarter_of_as_many_dense_copies(
    make_example: MakeExample, tmp_path: Path
) -> None:
    """At a density of .2, on disk and in memory; a second model adds nothing."""
    shape, count = (64, 4096), 24
    for dtype, most in ((torch.float32, 0.24), (torch.bfloat16, 0.27), (torch.float16, 0.27)):
        example = make_example(shards=0)
        shards = []
        for seed in range(count):
            bits = random_mask_bits(*shape, 0.2, seed)
            delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            shards.append(Shard.from_delta(delta, bits, seed=seed))
        example.memory.shape, example.memory.shards = shape, shards
        folder = tmp_path / str(dtype)
        example.save(folder)
        dense = count * shape[0] * shape[1] * dtype.itemsize
        memory = load_memory_dir(folder).memory
        bank, again = memory.bank(dtype), memory.bank(dtype)
        keys = 0 if memory.key_index is None else memory.key_index.nbytes()
        assert bank.values.data_ptr() == again.values.data_ptr()
        assert bank.mask_bits.data_ptr() == again.mask_bits.data_ptr()
        assert 0.2 * dense < bank.nbytes < most * dense < 0.28 * dense
        assert 0.2 * dense < (folder / TENSORS).stat().st_size - keys < most * dense


def test_sparse_shards_are_stored_by_their_columns(
    make_example: MakeExample, tmp_path: Path
) -> None:
    """Beside dense ones, and each comes back as it was."""
    sizes, shape = {}, (16, 1000)
    for name, ratios in {
        "mixed": (0.2, 0.02, 0.3, 0.01),
        "sparse": (0.02,),
        "dense": (0.2,),
    }.items():
        example = make_example(shards=0)
        shards = []
        for seed, ratio in enumerate(ratios):
            bits = random_mask_bits(*shape, ratio, seed)
            delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            shards.append(Shard.from_delta(delta, bits, seed=seed))
        example.memory.shape, example.memory.shards = shape, shards
        example.save(tmp_path / name)
        memory = load_memory_dir(tmp_path / name).memory
        assert [shard.sparse for shard in memory.shards] == [ratio < 1 / 16 for ratio in ratios]
        for before, after in zip(shards, memory.shards, strict=True):
            assert after.mask_bits.equal(before.mask_bits) and after.values.equal(before.values)
        stored = encoding_module.decode_tensors((tmp_path / name / TENSORS).read_bytes(), name)
        sizes[name] = sum(stored[f"bank.{part}"].nbytes for part in ("mask_bits", "columns"))
    bits = 16 * 32 * 4
    assert sizes["dense"] == bits and sizes["sparse"] == 2 * 16 * 20
    assert sizes["mixed"] == 2 * bits + 2 * 16 * (20 + 10)


def test_a_mapped_file_outlives_a_save_over_it(make_example: MakeExample, tmp_path: Path) -> None:
    old = make_example(shards=2)
    old.save(tmp_path)
    stored = load_memory_dir(tmp_path)
    make_example(shards=1).save(tmp_path)
    assert _same(stored, old)


def test_a_bank_is_made_anew_when_a_shard_is_another(make_example: MakeExample) -> None:
    memory, other = make_example(shards=3).memory, make_example(shards=2).memory
    before = memory.bank()
    assert memory.bank().values.data_ptr() == before.values.data_ptr()
    memory.replace_shard(1, other.shards[0])
    start, end = (int(memory.bank().row_ptr[n * memory.shape[0]]) for n in (1, 2))
    assert memory.bank().values[start:end].equal(other.shards[0].values)
    memory.remove_shard(0)
    assert memory.bank().num_shards == 2


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_mapped_file_that_is_not_whole_is_refused(
    make_example: MakeExample, tmp_path: Path, cut: int
) -> None:
    make_example().save(tmp_path)
    (tmp_path / "x").write_bytes((tmp_path / TENSORS).read_bytes()[:cut])
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        encoding_module.decode_tensors(map_file(tmp_path / "x"), "x")
