"""One process of `bench.peers`: both editors in turns, with the threads it was started with.

`python -m bench.peer_worker`; a JSON plan on standard input, a row a line on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from bench import peer_easyedit, same_settings
from bench.peer_easyedit import Cost, Peer, PeerError, clocked
from bench.peer_scoring import Scorer, overhead, repeated, summary
from bench.rows import provenance
from bench.timing import percentile
from wise_ext import Edit, Editor, WiseConfig, WiseError, load_model, patch, read_edits, unload
from wise_ext.editing.edits import demo_edits
from wise_ext.editing.prompts import neutral_prompts
from wise_ext.models import is_patched, last_route, layer_path

Row = dict[str, Any]
PEER, BATCHED, STREAM = "easyedit", "wise-ext, batched", "wise-ext, one at a time"


@dataclass(frozen=True)
class Plan:
    """What one process is to do; plain JSON values.

    Attributes:
        easyedit: folder of the clone.
        model: as `wise_ext.load_model` takes it.
        edits: file of edits; None takes the demo's invented facts.
        limit: edits of one batched call.
        stream: edits written one at a time, in all rounds together.
        rounds: edits of the peer, one a round.
        threads: torch's.
        batched, one_at_a_time, same: what of ours is measured.
        pairs: of the inference overhead's timings; 0 leaves it out.
        changes: settings of the peer that are not its own (tests).
        templates: context templates for the peer in place of the model's (tests).
    """

    easyedit: str
    model: str = "smollm2"
    edits: str | None = None
    limit: int = 100
    stream: int = 20
    rounds: int = 2
    threads: int = 1
    batched: bool = True
    one_at_a_time: bool = True
    same: bool = True
    pairs: int = 15
    seed: int = 0
    command: str = ""
    changes: dict[str, Any] | None = None
    templates: list[str] | None = None


def read_plan_edits(plan: Plan) -> list[Edit]:
    """The edits of a plan, as many as its largest side needs."""
    count = max(plan.limit, plan.stream, plan.rounds)
    if plan.edits is None:
        return demo_edits()[:count]
    return read_edits(plan.edits, limit=count)


def unrelated_texts(path: str | None, edits: list[Edit]) -> list[str]:
    """A text an edit that the peer may train its locality on: `wise_loc_prompt` where the record
    has one, else a neutral text. Never the edit's own locality prompt, which is measured."""
    given = {}
    if path is not None:
        text = Path(path).read_text(encoding="utf-8-sig")
        whole = text.lstrip().startswith("[")
        lines = [line for line in text.split("\n") if line.strip()]
        for record in json.loads(text) if whole else map(json.loads, lines):
            given[str(record.get("id", record.get("case_id")))] = record.get("wise_loc_prompt")
    neutral = neutral_prompts()
    return [given.get(e.id) or neutral[i % len(neutral)] for i, e in enumerate(edits)]


def in_turns(rounds: int, sides: list[Callable[[int], None]]) -> Iterator[tuple[int, int]]:
    """Every side once a round, the order turned round from round to round; yields (round, side)
    after each call."""
    for number in range(rounds):
        order = list(enumerate(sides))
        for place, side in order if number % 2 == 0 else reversed(order):
            side(number)
            yield number, place


class Bench:
    """Both editors on one model."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        code = peer_easyedit.load(Path(plan.easyedit))
        self.edits = read_plan_edits(plan)
        if len(self.edits) < plan.rounds:
            raise PeerError(f"there are {len(self.edits)} edits: ask for fewer --peer-edits")
        self.unrelated = unrelated_texts(plan.edits, self.edits)
        self.model, self.tokenizer = load_model(plan.model, "fp32", "cpu")
        self.layer = layer_path(self.model)
        self.peer = Peer(
            code, self.model, self.tokenizer, self.layer, plan.seed, plan.changes, plan.templates
        )
        self.costs: dict[str, list[Cost]] = {}
        self.sizes: dict[str, list[int]] = {}
        self.setup: dict[str, Cost] = {}
        self.editors: dict[str, Editor] = {}
        self.scorer = Scorer(self.model, self.tokenizer)
        self.same: list[Row] = []
        self._round = -1
        self._before: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None

    # -- one piece of work a side ------------------------------------------------------------------

    def edit_peer(self, number: int) -> None:
        """The peer's next edit."""
        self._remember(number)
        cost = self.peer.edit(self.edits[number], self.unrelated[number])
        self._note(PEER, cost, 1)

    def edit_batched(self, number: int) -> None:
        """All edits in one call of ours, from nothing."""
        self._ours(BATCHED, self.edits[: self.plan.limit], WiseConfig.preset("default"), fresh=True)

    def edit_stream(self, number: int) -> None:
        """The next few edits of ours, one after another into the same memory."""
        total, rounds = min(self.plan.stream, len(self.edits)), self.plan.rounds
        chunk = self.edits[total * number // rounds : total * (number + 1) // rounds]
        if chunk:
            self._ours(STREAM, chunk, WiseConfig.preset("default", batch_size=1), fresh=False)

    def edit_same(self, number: int) -> None:
        """The peer's edit of this round with its own settings, the frozen part run once."""
        self._remember(number)
        assert self._before is not None
        batch, start = self._before
        recipe = same_settings.Recipe.of(self.peer.hparams, self.model)
        found: list[Cost] = []
        with clocked(found):
            result = same_settings.train(
                self.model, self.layer, batch, start, self.peer.mask, recipe
            )
        self.same.append(
            {
                "round": number,
                "cpu": found[0].cpu,
                "wall": found[0].wall,
                "iterations": result.iterations,
                "weight": result.weight,
                "start": start,
                "shape": list(batch["input_ids"].shape),
            }
        )

    def _remember(self, number: int) -> None:
        """What the round's edit starts from, whoever comes first."""
        if self._round == number:
            return
        self._round = number
        batch = self.peer.batch(self.edits[number], self.unrelated[number])
        self._before = batch, self.peer.weight

    def _ours(self, side: str, edits: list[Edit], config: WiseConfig, fresh: bool) -> None:
        editor = None if fresh else self.editors.get(side)
        if editor is None:
            found: list[Cost] = []
            with clocked(found):
                editor = Editor(self.model, self.tokenizer, config)
            self.setup[side] = found[0]
            self.editors[side] = editor
        elif editor.memory.shards:
            patch(self.model, editor.memory)
        try:
            report = editor.edit(edits, progress=False)
        finally:
            if is_patched(self.model):
                unload(self.model)
        self._note(side, Cost(report.cpu_seconds, report.seconds, report.iterations), len(edits))

    def _note(self, side: str, cost: Cost, size: int) -> None:
        self.costs.setdefault(side, []).append(cost)
        self.sizes.setdefault(side, []).append(size)

    # -- the rows ----------------------------------------------------------------------------------

    def run(self) -> Iterator[Row]:
        """All rows, each as soon as it is known."""
        plan = self.plan
        self.setup[PEER] = self.peer.prepare()
        sides: list[Callable[[int], None]] = [self.edit_peer]
        sides += [self.edit_same] if plan.same else []
        sides += [self.edit_batched] if plan.batched else []
        sides += [self.edit_stream] if plan.one_at_a_time else []
        for number, _ in in_turns(plan.rounds, sides):
            done = len(self.same) > number and len(self.costs.get(PEER, [])) > number
            if done and "difference" not in self.same[number]:
                yield self._same_row(number)
        for side in (PEER, BATCHED, STREAM):
            if side in self.costs:
                yield self._edit_row(side)
        yield from self._quality()
        if plan.pairs:
            yield from self._overheads()

    def _same_row(self, number: int) -> Row:
        """Weights first: a speed is only told of the very same edit."""
        found, peer = self.same[number], self.costs[PEER][number]
        weight, start = found.pop("weight"), found.pop("start")
        found["difference"] = float((weight - self.peer.weight).abs().max())
        found["moved"] = float((self.peer.weight - start).abs().max())
        return {
            "kind": "same-settings",
            "edit": self.edits[number].id,
            "rows": found["shape"][0],
            "width": found["shape"][1],
            "iterations": peer.iterations,
            "our_iterations": found["iterations"],
            "difference": found["difference"],
            "moved": found["moved"],
            "peer_cpu_s": peer.cpu,
            "our_cpu_s": found["cpu"],
            "peer_wall_s": peer.wall,
            "our_wall_s": found["wall"],
        }

    def _edit_row(self, side: str) -> Row:
        costs, sizes = self.costs[side], self.sizes[side]
        setup = self.setup.get(side)

        def each(name: str) -> list[float]:
            return [getattr(cost, name) / n for cost, n in zip(costs, sizes, strict=True)]

        return {
            "kind": "edit",
            "side": side,
            "edits": sizes,
            "cpu_s_an_edit": percentile(each("cpu"), 0.5),
            "wall_s_an_edit": percentile(each("wall"), 0.5),
            "iterations_an_edit": sum(c.iterations for c in costs) / sum(sizes),
            "cpu_s_by_round": each("cpu"),
            "wall_s_by_round": each("wall"),
            "setup_cpu_s": setup.cpu if setup else None,
            "setup_wall_s": setup.wall if setup else None,
        }

    def _quality(self) -> Iterator[Row]:
        """Each side on its own edits; ours also on those the peer was given."""
        few = self.edits[: self.plan.rounds]
        self.scorer.refer(self.edits)
        yield self._quality_row("unedited", self.scorer.details(few, 1), 1)
        with self.peer.attached():
            yield self._quality_row(PEER, self.scorer.details(few, 1), 1)
        for side, count in ((BATCHED, self.plan.limit), (STREAM, self.plan.stream)):
            if side not in self.editors:
                continue
            patch(self.model, self.editors[side].memory)
            details = self.scorer.details(self.edits[:count], 16)
            unload(self.model)
            yield self._quality_row(side, details, 16)
            known = {edit.id for edit in few}
            shared = [d for d in details if d["id"] in known]
            if len(shared) < len(details):
                yield self._quality_row(side, shared, 16)

    def _quality_row(self, side: str, details: list[Row], batch_size: int) -> Row:
        return {"kind": "quality", "side": side, "batch_size": batch_size, **summary(details)}

    def _overheads(self) -> Iterator[Row]:
        """On a text made of an edit's prompt, and on one about nothing."""
        texts = {"edited prompt": self.edits[0].prompt, "other text": " ".join(neutral_prompts())}
        for name, text in texts.items():
            ids = repeated(self.tokenizer, text)
            yield {"kind": "overhead", "side": PEER, "text": name, **self._peer_overhead(ids)}
            for side, editor in self.editors.items():
                yield {
                    "kind": "overhead",
                    "side": side,
                    "text": name,
                    **self._our_overhead(editor, ids),
                }

    def _peer_overhead(self, ids: list[int]) -> Row:
        attached: Any = None

        def switch(edited: bool) -> None:
            nonlocal attached
            if edited and attached is None:
                attached = self.peer.attached()
                attached.__enter__()
            elif not edited and attached is not None:
                attached.__exit__(None, None, None)
                attached = None

        try:
            return overhead(self.model, ids, switch, self.plan.pairs)
        finally:
            switch(False)

    def _our_overhead(self, editor: Editor, ids: list[int]) -> Row:
        routes: list[int] = []

        def switch(edited: bool) -> None:
            if edited and not is_patched(self.model):
                patch(self.model, editor.memory)
            elif not edited and is_patched(self.model):
                latest = last_route(self.model)
                routes.extend([] if latest is None else latest.tolist())
                unload(self.model)

        try:
            found = overhead(self.model, ids, switch, self.plan.pairs)
        finally:
            switch(False)
        return {**found, "routed": sum(r >= 0 for r in routes) / max(1, len(routes))}


def main() -> int:
    """Do what the plan on standard input says."""
    plan = Plan(**json.load(sys.stdin))
    # Rows have standard output for themselves: whatever else prints must not break a line.
    lines = sys.stdout
    with redirect_stdout(sys.stderr):
        torch.set_num_threads(plan.threads)
        try:
            bench = Bench(plan)
            origin = provenance("cpu", plan.command)
            origin["easyedit"] = peer_easyedit.commit_of(Path(plan.easyedit))
            origin["layer"] = bench.layer
            for row in bench.run():
                print(json.dumps({**row, "machine": origin}), file=lines, flush=True)
        except same_settings.Unsuited as error:
            return _failed(f"{error}: compare with --no-same-settings", lines)
        except (PeerError, WiseError) as error:
            return _failed(str(error), lines)
    return 0


def _failed(why: str, lines: TextIO) -> int:
    print(json.dumps({"failure": why}), file=lines, flush=True)
    return 1


def ask(plan: Plan) -> str:
    """The line a worker is told."""
    return json.dumps(asdict(plan))


if __name__ == "__main__":
    sys.exit(main())
