"""`python -m bench.lifelong`: thousands of edits in a row, everything measured on the way.

python -m bench.lifelong                                     zsRE, 100 edits at a time
python -m bench.lifelong --regime stream --until 1000        one at a time
python -m bench.lifelong --dataset zsre+counterfact --until 3000
python -m bench.lifelong --set key_layer=2 mask_ratio=0.1 --name early-keys --half development

At every T of --at, and at the end, all edits so far are scored and one row goes to --json. A batch
is cut where a checkpoint lies within it. The run may be killed at any time: the same command goes
on from the last step that was journaled, and adds no row twice. Choose settings on
`--half development` (the records whose id hashes to an even number); the other half stays unseen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import lifelong_data as data
from bench.lifelong_options import parse
from bench.lifelong_state import Call, RunState, publish
from bench.rows import Row, command_line, homeless, provenance
from wise_ext.cli import console
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.editor import Editor
from wise_ext.editing.edits import find_conflicts
from wise_ext.editing.ledger import was_trained
from wise_ext.editing.progress import progress_bar
from wise_ext.errors import ConfigError, StorageError, WiseError
from wise_ext.evaluation.measuring import Wanted, count_units, measure
from wise_ext.evaluation.summary import summarise
from wise_ext.models import load_model
from wise_ext.storage.commit import has_journal

# Scored and kept at once: enough for batches of similar lengths, little to lose.
_PART = 256
COLUMNS = (
    "T",
    "n",
    "Rel",
    "Gen",
    "Loc",
    "generated edit",
    "rephrase",
    "right shard edit",
    "rephrase",
    "unrelated to main",
    "CPU s an edit",
)


class Run:
    """One run: its edits, its settings and its folder.

    Args:
        options: the command line.
        pool: what is edited.
        config: how.
        state: the run's folder.
    """

    def __init__(
        self, options: argparse.Namespace, pool: data.Pool, config: WiseConfig, state: RunState
    ) -> None:
        self.options, self.pool, self.config, self.state = options, pool, config, state
        self.end = min(options.until or len(pool.edits), len(pool.edits))
        self.checkpoints = [t for t in options.at if t < self.end] + [self.end]
        self.wanted = _wanted(options, config)

    def go(self) -> list[Row]:
        """Edit and score whatever is not done yet; the rows of all checkpoints."""
        if any(self.state.row(t) is None for t in self.checkpoints):
            model, tokenizer = load_model(self.options.model)
            editor = self._editor(model, tokenizer)
            for t in self.checkpoints:
                passed = len(editor.ledger) > t
                if passed and self.state.row(t) is None:
                    console.note(f"T={t} has passed without a row: only a new run can score it")
                    continue
                self._edit(editor, t)
                if self.state.row(t) is None:
                    self.state.keep_row(t, self._score(editor, model, tokenizer, t))
                self._publish(t)
        for t in self.checkpoints:
            self._publish(t)
        return [row for t in self.checkpoints if (row := self.state.row(t)) is not None]

    def _publish(self, t: int) -> None:
        row = self.state.row(t)
        if row is not None and publish(self.options.json, row):
            console.note(f"T={t}: {_short(row)}")

    # -- editing -----------------------------------------------------------------------------------

    def _editor(self, model: Any, tokenizer: Any) -> Editor:
        """The editor where it was when the run was last stopped."""
        state, journaled = self.state, has_journal(self.state.memory)
        editor = Editor(model, tokenizer, self.config, state.memory, resume=journaled)
        done, call = len(editor.ledger), state.unfinished()
        if call is not None and not journaled and done == call.end:
            state.finish(call)  # stopped between the memory's save and the note of it
            call = None
        if done != state.edited:
            raise StorageError(
                f"the memory in {state.memory} holds {done} edits where the run has made "
                f"{state.edited}: remove {state.folder} to start over"
            )
        if call is not None:
            self._call(editor, call, self.end)
        return editor

    def _edit(self, editor: Editor, t: int) -> None:
        """Edit on until there are ``t``."""
        size = 1 if self.options.regime == "stream" else self.options.batch
        while (done := len(editor.ledger)) < t:
            self._call(editor, Call(done, min(t, (done // size + 1) * size)), t)

    def _call(self, editor: Editor, call: Call, goal: int) -> None:
        beat = self.state.begin(call)
        with _bar("editing", call.start, max(goal, call.end)) as move:

            def told(done: int, total: int) -> None:
                beat()
                move(done)

            report = editor.edit(self.pool.edits[call.start : call.end], progress=told)
        cpu, seconds = call.cpu + report.cpu_seconds, call.seconds + report.seconds
        self.state.finish(Call(call.start, call.end, cpu, seconds))

    # -- scoring -----------------------------------------------------------------------------------

    def _score(self, editor: Editor, model: Any, tokenizer: Any, t: int) -> Row:
        edits = list(self.pool.edits[:t])
        conflicts = find_conflicts(edits)
        superseded = {older for older, _ in conflicts}
        kept = [edit for edit in edits if edit.id not in superseded]
        digest = hashlib.sha256(json.dumps(asdict(self.wanted)).encode()).hexdigest()[:8]
        scored: list[dict[str, Any]] = []
        cpu = 0.0
        units = 0
        with _bar(f"scoring T={t}", 0, count_units(kept, self.wanted)) as move:

            def tick(rows: int) -> None:
                nonlocal units
                units += rows
                move(units)

            for start in range(0, len(kept), _PART):
                chosen = kept[start : start + _PART]
                name = f"{t}-{digest}-{start}"
                part = self.state.part(name)
                if part is None:
                    began = time.process_time()
                    rows = measure(model, tokenizer, chosen, self.wanted, tick)
                    part = {"rows": rows, "cpu": time.process_time() - began}
                    self.state.keep_part(name, part)
                else:
                    tick(count_units(chosen, self.wanted))
                scored += part["rows"]
                cpu += part["cpu"]
        costs = self._costs(t) | {"cpu_seconds_score": cpu / max(len(kept), 1)}
        report = summarise(scored)
        apart = data.undisputed(edits)
        report["undisputed"] = summarise([row for row in scored if row["id"] in apart])
        return self._row(editor, t, report, len(superseded), costs)

    def _costs(self, t: int) -> dict[str, float]:
        before = max((c for c in self.checkpoints if c < t), default=0)
        cpu, seconds = self.state.cost(0, t)
        span, _ = self.state.cost(before, t)
        return {
            "cpu_seconds_edit": cpu / t,
            "cpu_seconds_edit_span": span / (t - before),
            "seconds_edit": seconds / t,
        }

    def _row(
        self,
        editor: Editor,
        t: int,
        report: dict[str, Any],
        superseded: int,
        costs: dict[str, float],
    ) -> Row:
        memory, ledger = editor.memory, editor.ledger[:t]
        index = memory.key_index
        key_bytes = 0 if index is None else index.nbytes()
        trained = [entry for entry in ledger if was_trained(entry)]
        options = self.options
        row: Row = {
            "T": t,
            "regime": options.regime,
            "dataset": options.dataset,
            "name": options.name,
            "run": self.state.run,
            "model": homeless(options.model),
            "n": report["n"],
            "superseded": superseded,
            "rel": report["reliability"],
            "gen": report["generalization"],
            "loc": report["locality"],
            "generation": report["generation"],
            "routing": report["routing"],
            "unedited": report["unedited"] if self.wanted.unedited else None,
            "target_perplexity": report.get("target_perplexity"),
            "undisputed": _undisputed(report["undisputed"]),
            **costs,
            "iterations": sum(entry["iterations"] for entry in trained) / max(len(trained), 1),
            "unconverged": sum(not entry["converged"] for entry in trained),
            "conflicts": len(find_conflicts(self.pool.edits[:t])),
            "shards": len(memory.shards),
            "bytes_per_edit": memory.nbytes() / t,
            "key_bytes_per_edit": key_bytes / t,
            "batch": 1 if options.regime == "stream" else options.batch,
            "half": options.half,
            "shuffle": options.shuffle,
            "offset": options.offset,
            "preset": options.preset,
            "settings": _changed(self.config),
            "scoring": asdict(self.wanted),
            "data": list(self.pool.files),
            "dropped": self.pool.dropped,
            "machine": provenance(str(editor.model.device.type), _command()),
        }
        rounded: Row = _rounded(row)
        return rounded


class _bar:
    """A bar on standard error that starts where the work starts; yields what moves it."""

    def __init__(self, description: str, start: int, total: int) -> None:
        self._bar, self._start, self._total = progress_bar(description), start, total

    def __enter__(self) -> Callable[[int], None]:
        move = self._bar.__enter__()
        move(self._start, self._total)
        return lambda done: move(self._start + done, self._total)

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def _wanted(options: argparse.Namespace, config: WiseConfig) -> Wanted:
    """How edits are scored: long targets by their perplexity, facts by generated answers."""
    texts = options.dataset in data.TEXTS
    return Wanted(
        chat=config.chat_template,
        batch_size=options.rows or (8 if texts else 64),
        max_new_tokens=options.max_new_tokens,
        generation=not texts if options.generate is None else options.generate,
        unedited=texts or options.unedited,
        perplexity=texts or options.perplexity,
    )


def _changed(config: WiseConfig) -> dict[str, Any]:
    plain = WiseConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != plain[name]}


def _undisputed(report: dict[str, Any]) -> dict[str, Any]:
    generation = report["generation"]
    return {
        "n": report["n"],
        "rel": report["reliability"],
        "gen": report["generalization"],
        "generation": {name: generation[name] for name in ("reliability", "generalization")},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _command() -> str:
    """The command, without the folders of this machine."""
    return command_line("bench.lifelong", sys.argv[1:])


def _short(row: Row) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in zip(COLUMNS[1:], _cells(row)[1:], strict=True) if value
    )


def _cells(row: Row) -> list[str | None]:
    routing, generation = row["routing"], row["generation"]
    shares = (
        row["rel"],
        row["gen"],
        row["loc"],
        generation["reliability"],
        generation["generalization"],
        routing["right_shard"],
        routing["right_shard_rephrase"],
        routing["locality_to_main"],
    )
    cells = [None if share is None else f"{share:.3f}" for share in shares]
    return [str(row["T"]), str(row["n"]), *cells, f"{row['cpu_seconds_edit']:.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the exit status."""
    options = parse(__doc__, arguments)
    torch.set_num_threads(options.threads)
    state: RunState | None = None
    try:
        changes = dict(options.set)
        if options.regime == "stream" and changes.setdefault("batch_size", 1) != 1:
            raise ConfigError("the stream regime is one edit at a time: leave batch_size out")
        config = WiseConfig.preset(options.preset, **changes)
        pool = data.pool(
            options.dataset,
            data.data_folder(options.data),
            half=options.half,
            shuffle=options.shuffle,
            offset=options.offset,
        )
        if options.until and options.until > len(pool.edits):
            console.note(f"{options.dataset} has {len(pool.edits)} edits: stopping there")
        for reason, count in pool.dropped.items():
            if count:
                what = "with another target" if reason == "conflicting" else "with the same target"
                console.note(f"{count} records left out: an earlier one has the prompt, {what}")
        state = RunState(options.work, _identity(options, pool, config))
        rows = Run(options, pool, config, state).go()
    except WiseError as error:
        console.complain(str(error))
        return 1
    except KeyboardInterrupt:
        made = state.edited if state else 0
        console.note(f"stopped behind {made} edits: the same command goes on from the last step")
        return 130
    finally:
        if state is not None:
            state.close()
    console.table(options.name, COLUMNS, map(_cells, rows), right=COLUMNS)
    return 0


def _identity(options: argparse.Namespace, pool: data.Pool, config: WiseConfig) -> dict[str, Any]:
    """What must not change while a run goes on; how far and how it is scored may."""
    names = ("dataset", "regime", "model", "half", "shuffle", "offset", "batch", "preset")
    return {
        **{name: getattr(options, name) for name in names},
        "config": config.to_dict(),
        "data": {file["file"]: file["sha256"] for file in pool.files},
    }


if __name__ == "__main__":
    sys.exit(main())
