"""Asking a patched model: routes, answers and perplexities, and the figures made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench import asked as prompts
from bench import rows as bench_rows
from bench.asked import Asked, Neutral
from wise_ext import models
from wise_ext.editing.prompts import stop_token
from wise_ext.evaluation.generation import text_of, write_answers
from wise_ext.evaluation.metrics import contains, mean, same_text
from wise_ext.evaluation.scoring import length_batches, pad
from wise_ext.memory import MAIN, SideMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 8
# A first turn is answered with this many tokens: enough to make the dialogue a real one.
_REPLY = 12


@dataclass(frozen=True)
class Found:
    """What became of one prompt: its route, and the answer where one was generated."""

    asked: Asked
    route: int
    answer: str | None = None


class Read(NamedTuple):
    """What became of a neutral text: its route, how many tokens are predicted, and their summed
    negative log-likelihood without and with the memory, where it was looked at."""

    text: Neutral
    route: int
    tokens: int
    unedited: float | None
    edited: float | None


class Asker:
    """Asks a patched model; leaves it as it was.

    Args:
        model: patched.
        tokenizer: its tokenizer.
        max_new_tokens: the longest answer; 0 looks at routes alone.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def ask(self, asked: Sequence[Asked]) -> Iterator[Found]:
        """Every prompt once, in no particular order; answers only where a fact is asked."""
        alone = [a for a in asked if a.first is None]
        wanted = [a for a in alone if a.facts and self.max_new_tokens]
        routed = [a for a in alone if not (a.facts and self.max_new_tokens)]
        for chunk in self._batches(wanted):
            rows = [ids for _, ids in chunk]
            written = write_answers(
                self.model, self.tokenizer, rows, max_new_tokens=self.max_new_tokens
            )
            for (one, _), answer in zip(chunk, written, strict=True):
                yield Found(one, answer.taken.route, text_of(self.tokenizer, answer.tokens))
        for chunk in self._batches(routed):
            ids, mask = pad([ids for _, ids in chunk], self.model, left=True, pad_id=self._pad)
            routes = models.decide_routes(self.model, ids, mask).route.tolist()
            yield from (Found(one, r) for (one, _), r in zip(chunk, routes, strict=True))
        for one in asked:
            if one.first is not None:
                yield self._later_turn(one)

    @torch.no_grad()
    def _later_turn(self, asked: Asked) -> Found:
        """Two turns of one dialogue on one cache, as a server keeps it: what the second prompt
        shares with the tokens so far is not computed again."""
        from transformers import DynamicCache

        cache = DynamicCache()
        first = prompts.encode(self.tokenizer, asked)
        so_far = self._continue(first, cache, _REPLY)
        reply = text_of(self.tokenizer, so_far[len(first) :]).strip()
        second = prompts.encode(self.tokenizer, asked, reply)
        pairs = zip(so_far, second, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        surplus = cache.get_seq_length() - min(shared, len(second) - 1)
        if surplus > 0:
            cache.crop(-surplus)
        wanted = self.max_new_tokens if asked.facts else 0
        written = self._continue(second, cache, wanted or 1)
        latest = models.last_route(self.model)
        assert latest is not None
        answer = text_of(self.tokenizer, written[len(second) :]) if wanted else None
        return Found(asked, int(latest[0]), answer)

    def _continue(self, ids: list[int], cache: Any, max_new_tokens: int) -> list[int]:
        generator: Any = self.model
        row = torch.tensor([ids], device=self.model.device)
        output = generator.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=stop_token(self.tokenizer),
            pad_token_id=self._pad,
        )
        return [int(i) for i in output[0]]

    def _batches(self, asked: Sequence[Asked]) -> Iterator[list[tuple[Asked, list[int]]]]:
        pairs = [(one, prompts.encode(self.tokenizer, one)) for one in asked]
        for batch in length_batches([len(ids) for _, ids in pairs], _BATCH):
            yield [pairs[i] for i in batch]

    @property
    def _pad(self) -> int:
        own = self.tokenizer.pad_token_id
        return int(own) if isinstance(own, int) else stop_token(self.tokenizer)

    @torch.no_grad()
    def read(self, texts: Sequence[Neutral]) -> Iterator[Read]:
        """Every neutral text once, in no particular order; routes alone without answers."""
        encoded = [[int(i) for i in self.tokenizer(t.text)["input_ids"]] for t in texts]
        for batch in length_batches([len(ids) for ids in encoded], _BATCH):
            ids, mask = pad([encoded[i] for i in batch], self.model, left=False, pad_id=self._pad)
            losses: list[list[float] | None] = [None, None]
            if self.max_new_tokens:
                with models.disabled(self.model):
                    losses[0] = self._surprise(ids, mask)
                losses[1] = self._surprise(ids, mask)
                routes = models.last_route(self.model)
                assert routes is not None
            else:
                routes = models.decide_routes(self.model, ids, mask).route
            for place, (i, route) in enumerate(zip(batch, routes.tolist(), strict=True)):
                plain, edited = (None if values is None else values[place] for values in losses)
                yield Read(texts[i], route, len(encoded[i]) - 1, plain, edited)

    def _surprise(self, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        return [float(v) for v in (losses.view(mask[:, 1:].shape) * mask[:, 1:]).sum(-1)]


def kind_rows(
    found: Sequence[Found], memory: SideMemory, targets: Mapping[str, str]
) -> list[bench_rows.Row]:
    """One row a kind: recall where a fact is asked, the share of false alarms where none is.

    Args:
        found: what was measured.
        memory: where the edits are; a route is right if that shard holds an edit asked about.
        targets: the answer to each fact.
    """
    rows = []
    for kind in prompts.KINDS:
        own = [f for f in found if f.asked.kind == kind]
        if not own:
            continue
        recall = {
            case: {
                "n": len(group),
                "to_side": mean(f.route != MAIN for f in group),
                "right_edit": mean(_is_right(f, memory) for f in group),
                "right_later": mean(_is_right(f, memory, last=True) for f in group),
                "contains": mean(_answers(f, targets, contains) for f in group),
                "equal": mean(_answers(f, targets, same_text) for f in group),
            }
            for case, group in _by_case(own, prompts.POSITIVE)
        }
        alarms = {
            case: {"n": len(group), "share": mean(f.route != MAIN for f in group)}
            for case, group in _by_case(own, prompts.NEGATIVE)
        }
        rows.append({"measured": "asked", "kind": kind, "recall": recall, "false_alarms": alarms})
    return rows


def _by_case(found: Sequence[Found], cases: Sequence[str]) -> Iterator[tuple[str, list[Found]]]:
    for case in cases:
        group = [f for f in found if f.asked.case == case]
        if group:
            yield case, group


def _is_right(found: Found, memory: SideMemory, last: bool = False) -> bool:
    facts = found.asked.facts[-1:] if last else found.asked.facts
    return found.route != MAIN and found.route in [memory.shard_of(name) for name in facts]


def _answers(
    found: Found, targets: Mapping[str, str], same: Callable[[str, str], bool]
) -> bool | None:
    if found.answer is None:
        return None
    return any(same(found.answer, targets[name]) for name in found.asked.facts)


def elsewhere_rows(read: Sequence[Read]) -> list[bench_rows.Row]:
    """One row a kind of neutral text; perplexities are over all tokens of the kind."""
    rows = []
    for kind in sorted({r.text.kind for r in read}):
        own = [r for r in read if r.text.kind == kind]
        tokens = sum(r.tokens for r in own)
        rows.append(
            {
                "measured": "elsewhere",
                "kind": kind,
                "texts": len(own),
                "tokens": tokens,
                "to_main": mean(r.route == MAIN for r in own),
                "perplexity_unedited": _perplexity([r.unedited for r in own], tokens),
                "perplexity_edited": _perplexity([r.edited for r in own], tokens),
            }
        )
    return rows


def _perplexity(losses: Sequence[float | None], tokens: int) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return math.exp(sum(known) / tokens) if known else None
