"""Corpora: what is read from which file, lazily, and one clear line where it cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wise_ext.editing.corpus import Corpus, default_corpus, read_corpus
from wise_ext.errors import DataError

TEXTS = ["One text,\nof two lines.", "Another — with a dash.", "x"]


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \n\n".join(["", *TEXTS, ""]).encode())
    corpus = read_corpus(path)
    assert corpus.name == "texts.txt"
    assert list(corpus) == TEXTS
    assert list(corpus) == TEXTS, "it can be read again"


@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: {"id": 3, "text": text}])
def test_json_files(tmp_path: Path, wrap: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps([wrap(text) for text in TEXTS]))
    (tmp_path / "b.jsonl").write_text("\n\n".join(json.dumps(wrap(text)) for text in TEXTS))
    assert list(read_corpus(tmp_path / "a.json")) == TEXTS
    assert list(read_corpus(str(tmp_path / "b.jsonl"))) == TEXTS


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("c.txt", "a.jsonl", "b.json"):
        text = {"c.txt": "c", "a.jsonl": '"a"\n', "b.json": '["b"]'}[name]
        (tmp_path / name).write_text(text)
    (tmp_path / "notes.md").write_text("not this")
    (tmp_path / "d").mkdir()
    corpus = read_corpus(tmp_path)
    assert corpus.name == tmp_path.name
    assert list(corpus) == ["a", "b", "c"]


def test_read_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('"first"\n{broken\n')
    texts = iter(read_corpus(path))
    assert next(texts) == "first"
    with pytest.raises(DataError, match=r"x.jsonl line 2: broken JSON .*: correct it"):
        next(texts)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
def test_lines_of_json_keep_every_text(tmp_path_factory: Any, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(read_corpus(path)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"one\n\ntwo \xff", "x.txt line 3: not UTF-8: save the file as UTF-8"),
        ("x.jsonl", b'{"body": "a"}', "line 1: no text: write a text, or an object with a field"),
        ("x.jsonl", b'{"text": 4}', "line 1: no text"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: holds half a character"),
        ("x.json", b'{"text": "a"}', "x.json: holds no list: write a list of texts"),
        ("x.json", b'["a", null]', "x.json text 2: no text"),
        ("x.json", b"[" * 100_000, "x.json: broken JSON"),
    ],
)
def test_bad_content(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_corpus(tmp_path / name))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_paths_are_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder: check the path"):
        read_corpus(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"no .txt, .jsonl, .json or .parquet file in this folder"):
        read_corpus(tmp_path)
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"what a .pdf file holds is not known: give a .txt"):
        read_corpus(tmp_path / "x.pdf")


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a")
    corpus = read_corpus(path)
    path.unlink()
    with pytest.raises(DataError, match=r"x.txt: cannot be read \(No such file or directory\)"):
        list(corpus)


@pytest.mark.parametrize(
    ("name", "library"), [("x.parquet", "pyarrow"), ("saved/state.json", "datasets")]
)
def test_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / name.split("/")[0]
    with pytest.raises(DataError) as caught:
        read_corpus(path)
    message = f"is read with {library}, which is not installed: pip install {library}, or give"
    assert f"{path}: {message}" in str(caught.value)


def test_tables(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": [1, 2, 3], "text": TEXTS}), tmp_path / "b.parquet")
    parquet.write_table(arrow.table({"text": ["first"]}), tmp_path / "a.parquet")
    assert list(read_corpus(tmp_path / "b.parquet")) == TEXTS
    assert list(read_corpus(tmp_path)) == ["first", *TEXTS]
    parquet.write_table(arrow.table({"body": TEXTS}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r'c.parquet: no column "text" among body'):
        list(read_corpus(tmp_path))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"c.parquet: cannot be read \("):
        list(read_corpus(tmp_path))


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "text": TEXTS})
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "all")
    datasets.DatasetDict({"test": rows.select([2])}).save_to_disk(tmp_path / "test")
    assert list(read_corpus(tmp_path / "rows")) == list(read_corpus(tmp_path / "all")) == TEXTS
    assert list(read_corpus(tmp_path / "test")) == TEXTS[2:]
    rows.rename_column("text", "body").save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match='other: no column "text" among id, body'):
        list(read_corpus(tmp_path / "other"))
    (tmp_path / "rows" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"rows: cannot be read \("):
        list(read_corpus(tmp_path / "rows"))


def test_the_default_corpus_is_large_and_varied() -> None:
    corpus = default_corpus()
    texts = list(corpus)
    assert isinstance(corpus, Corpus) and corpus.name == "wise-ext"
    assert len(texts) == len(set(texts)) >= 220
    words = [word.strip('.,;:!?()"').casefold() for text in texts for word in text.split()]
    assert len(words) >= 20_000
    assert len(set(words)) >= 5_000
    assert all(60 <= len(text.split()) <= 110 for text in texts)
    # No two begin alike.
    assert len({" ".join(text.split()[:6]) for text in texts}) == len(texts)
