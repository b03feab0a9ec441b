"""The tables of long answers stand in the docs as their rows say."""

from __future__ import annotations

from bench import rows
from bench.long_tables import PAGE, RESULTS, table, with_tables


def test_the_page_shows_what_was_recorded() -> None:
    page = PAGE.read_text("utf-8")
    assert page == with_tables(page, rows.read(RESULTS)), "run python -m bench.long_tables"


def test_a_table_has_a_line_a_method_and_says_how_few_were_measured() -> None:
    row: rows.Row = {"method": "rome", "file": "unke.dev.jsonl", "regime": "each", "n": 10}
    row |= {"rouge_l": {"original": 0.25, "paraphrase": 0.2004}, "locality": 1.0}
    row |= {"cpu_seconds": 68.44}
    other = row | {"n": 50, "file": "editevery.dev.jsonl"}
    other["rouge_l"] = {"original": 0.0312, "paraphrase": None}
    head, rule, *lines = table("each", [row, other, row | {"regime": "sequence", "n": 3}])
    assert head.count("|") == rule.count("|") == 11 and len(lines) == 12
    (rome,) = (line for line in lines if line.startswith("| ROME"))
    assert rome == "| ROME | .250 / .200 (10) | 1.000 | 68.4 |  |  |  | .031 | 1.000 | 68.4 |"
    assert sum("1.000" in line for line in lines) == 1
