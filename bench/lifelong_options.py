"""The command line of `bench.lifelong`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import lifelong_data as data
from bench.rows import ROOT
from wise_ext.editing.config import PRESETS
from wise_ext.editing.settings import read_settings
from wise_ext.errors import ConfigError

CHECKPOINTS = (10, 100, 300, 1000, 3000)
RESULTS = ROOT / "bench" / "results" / "lifelong.jsonl"
BATCH = 100


def _setting(text: str) -> tuple[str, Any]:
    try:
        ((name, value),) = read_settings([text]).items()
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, value


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of edits, for example 10,100,300")
    return counts


def _number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number >= {least}")
        return int(text)

    return parse


def parse(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lifelong",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=data.DATASETS, default="zsre")
    add("--regime", choices=("batch", "stream"), default="batch", help="100 edits at a time, or 1")
    add("--until", type=_number(1), metavar="T", help="edits in all; default: all there are")
    add("--at", type=_counts, default=list(CHECKPOINTS), metavar="T,T", help="when to score")
    add("--name", help="of the run, in its rows and its folder; default: dataset and regime")
    add("--preset", choices=PRESETS, default="default")
    add("--set", type=_setting, nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    add("--batch", type=_number(1), default=BATCH, help="edits at a time in the batch regime")
    add("--model", default="smollm2", help="hub id, local directory, .gguf file, or smollm2")
    add("--half", choices=data.HALVES, default="all", help="which records, by a hash of their id")
    add("--shuffle", type=_number(0), metavar="SEED", help="another order within each data set")
    add("--offset", type=_number(0), default=0, metavar="N", help="leave out the first N edits")
    add("--data", type=Path, metavar="DIR", help="where the data files are")
    add("--work", type=Path, metavar="DIR", help="the run's folder; default: build/lifelong/NAME")
    add("--json", type=Path, default=RESULTS, metavar="FILE", help="where rows are appended")
    add("--max-new-tokens", type=_number(1), default=32, metavar="N")
    add("--generate", action=argparse.BooleanOptionalAction, help="generated answers, or not")
    add("--perplexity", action="store_true", help="of the targets, also where they are short")
    add("--unedited", action="store_true", help="score the unedited model too")
    add("--rows", type=_number(1), metavar="N", help="rows scored at once")
    add("--threads", type=_number(1), default=1, metavar="N", help="threads of torch")
    options = parser.parse_args(arguments)
    half = "" if options.half == "all" else f"-{options.half}"
    options.name = options.name or f"{options.dataset}-{options.regime}{half}"
    if options.name != Path(options.name).name:
        parser.error(f"--name {options.name!r} is to be the name of a folder, without slashes")
    options.work = options.work or ROOT / "build" / "lifelong" / options.name
    return options
