"""`python -m bench.long_tables`: docs/anyedit.md's tables of editors, out of recorded rows.

The rows are those of ``wise-ext compare`` in bench/results/longform.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bench import rows

RESULTS = Path(__file__).with_name("results") / "longform.jsonl"
PAGE = rows.ROOT / "docs" / "anyedit.md"

_FILES = {
    "unke.dev.jsonl": "UnKE",
    "akew_mquake_cf.dev.jsonl": "AKEW",
    "editevery.dev.jsonl": "EditEverything",
}
_METHODS = {
    "anyedit": "**anyedit**, into a side memory",
    "wise": "WISE",
    "grace": "GRACE",
    "anyedit-memit": "anyedit-memit",
    "anyedit-alphaedit": "anyedit-alphaedit",
    "anyedit-unke": "anyedit-unke",
    "memit": "MEMIT",
    "alphaedit": "AlphaEdit",
    "rome": "ROME",
    "unke": "UnKE",
    "ft-ewc": "FT-EWC",
    "ft-l": "FT-L",
}
_REGIMES = {"each": "one at a time", "sequence": "in sequence, then asked"}
# A row of fewer edits says of how many.
_WHOLE = 50


def table(regime: str, measured: Iterable[rows.Row]) -> Iterator[str]:
    """The lines of one regime's table: a method a line, three columns a file."""
    found = {(row["method"], row["file"]): row for row in measured if row["regime"] == regime}
    heads = [f"{name}: ROUGE-L | locality | CPU s" for name in _FILES.values()]
    heads[0] = heads[0].replace("ROUGE-L", "ROUGE-L, question / other words")
    yield f"| {_REGIMES[regime]} | " + " | ".join(heads) + " |"
    yield "|---" * (1 + 3 * len(_FILES)) + "|"
    for method, name in _METHODS.items():
        cells = [cell for file in _FILES for cell in _cells(found.get((method, file)))]
        yield f"| {name} | " + " | ".join(cells) + " |"


def with_tables(page: str, measured: list[rows.Row]) -> str:
    """The page with its tables made anew."""
    for regime in _REGIMES:
        begin, end = f"<!-- {regime}: bench.long_tables -->\n", f"<!-- {regime} ends -->\n"
        before, rest = page.split(begin)
        lines = "".join(f"{line}\n" for line in table(regime, measured))
        page = before + begin + lines + end + rest.split(end)[1]
    return page


def _cells(row: rows.Row | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    asked = row["rouge_l"]
    said = " / ".join(_short(asked[of]) for of in asked if asked[of] is not None)
    if row["n"] < _WHOLE:
        said += f" ({row['n']})"
    return said, _short(row["locality"]), f"{row['cpu_seconds']:.1f}"


def _short(share: float) -> str:
    """Three digits, without a leading zero."""
    return f"{share:.3f}".removeprefix("0")


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), rows.read(RESULTS)), "utf-8")


if __name__ == "__main__":
    main()
