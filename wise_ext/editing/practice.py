"""What an edit is practised on: its rows, captured once through the frozen part of the model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wise_ext.editing.config import WiseConfig
from wise_ext.editing.contexts import in_context, shorter
from wise_ext.editing.edits import Edit
from wise_ext.editing.losses import Margins
from wise_ext.editing.prompts import (
    encode_prompt,
    encode_target,
    has_chat_template,
    neutral_prompts,
    subject_tokens,
)
from wise_ext.editing.rows import Row
from wise_ext.editing.suffix import HALF_MARGIN, SuffixEngine
from wise_ext.editing.wordings import examples, moved, reworded
from wise_ext.memory import KeyIndex, TokenKeys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Prompts run at a time.
_CHUNK = 32
# Neutral prompts that the margins' unit is measured on, and those that half precision is tried on.
_SAMPLE, _PROBES = 16, 2
# Cosine to a known relation above which a prompt is taken to ask just that.
_RECOGNISED = 0.6
# The paper's margins suit projections whose output has about this norm a token.
_PAPER_MARGINS = Margins(5.0, 20.0, 10.0)
_PAPER_OUTPUT_NORM = 100.0


@dataclass(eq=False)
class Practice:
    """An edit's captured rows: the bare prompt, the prompt in its contexts, other wordings of it,
    shorter or of another form (practised as far as it goes: two edits may share one), and (where
    margins are trained) an unrelated prompt; what it is found by, and what it asks (a direction,
    or nothing)."""

    edit: Edit
    bare: Row
    contexts: list[Row]
    wordings: list[Row]
    unrelated: Row | None
    locality_prompt: str | None
    addresses: list[TokenKeys]
    asked: Tensor

    def give(self, cue: Tensor | None) -> None:
        """Let this cue, [d_ff], enter the side memory with its rows, whatever their wording."""
        for row in (self.bare, *self.contexts, *self.wordings):
            row.cue = cue


class Coach:
    """Turns edits into rows. What it captures depends on the edit and the settings alone, never on
    the company it comes in, so any part of a run can be repeated to the same bits."""

    def __init__(
        self,
        engine: SuffixEngine,
        tokenizer: PreTrainedTokenizerBase,
        config: WiseConfig,
        contexts: list[str],
    ) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._config = config
        self._contexts = contexts
        #: Products in half precision will do where the margin that labels are given makes up for
        #: it. What an edit is in the bare prompt is captured exactly all the same.
        self.in_half = config.early_stop and config.stop_margin >= HALF_MARGIN
        if self.in_half:
            chats = [False, True] if has_chat_template(tokenizer) else [False]
            some = neutral_prompts()[:_PROBES]
            engine.halve_captures([encode_prompt(tokenizer, t, c) for c in chats for t in some])
        self._known: dict[str, Practice] = {}
        self._found_by: dict[str, tuple[Edit, list[TokenKeys]]] = {}
        self._index: KeyIndex | None = None

    def practice(self, edit: Edit) -> Practice:
        """The edit's rows; captured at the first asking, kept until ``forget``.

        Raises:
            DataError: the prompt or the target has no tokens.
        """
        known = self._known.get(edit.id)
        if known is None or known.edit != edit:
            known = self._known[edit.id] = self._capture(edit)
        return known

    def forget(self) -> None:
        """Free all rows and keys."""
        self._known.clear()
        self._found_by.clear()

    def empty_index(self) -> KeyIndex:
        """A key index without edits that knows neutral prompts, which stand for everything else,
        and the wordings of known relations. By it, the coach tells what an edit asks."""
        if self._index is None:
            made = examples()
            texts, subjects = zip(*(pair for relation in made for pair in relation), strict=True)
            wordings = iter(self.keys(texts, subjects))
            asked = [[next(wordings) for _ in relation] for relation in made]
            if has_chat_template(self._tokenizer) and not self._config.chat_template:
                # what the template does to a wording is no difference of what it asks
                texts, subjects = zip(*(relation[0] for relation in made), strict=True)
                in_template = self.keys(texts, subjects, chat=True)
                asked = [[*keys, chat] for keys, chat in zip(asked, in_template, strict=True)]
            neutral = neutral_prompts()
            background = self.keys(neutral, [None] * len(neutral))
            self._index = KeyIndex(
                background[0].activation.shape[1],
                background=background,
                relations=asked,
            )
        return self._index

    def keys(
        self, prompts: Sequence[str], subjects: Sequence[str | None], chat: bool | None = None
    ) -> list[TokenKeys]:
        """The token keys of prompts, each with its subject's tokens where it is named; in the chat
        template or not (None: as the settings say)."""
        chat = self._config.chat_template if chat is None else chat
        keys: list[TokenKeys] = []
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            keys += self.engine.keys([encode_prompt(self._tokenizer, t, chat) for t in chunk])
        return [
            self._about(key, prompt, subject, chat)
            for key, prompt, subject in zip(keys, prompts, subjects, strict=True)
        ]

    def addresses(self, prompt: str, subject: str | None) -> list[TokenKeys]:
        """What an edit is found by: the keys of its prompt, and of its subject's name elsewhere in
        a text, where that is written in other tokens. Empty without a key layer."""
        if self.engine.key_projection is None:
            return []
        texts = [text for text in (prompt, moved(prompt, subject)) if text]
        keys = self.keys(texts, [subject] * len(texts))
        names = {tuple(k.ids[k.subject].tolist()) for k in keys if k.subject is not None}
        return keys if len(names) > 1 else keys[:1]

    def found_by(self, edit: Edit) -> list[TokenKeys]:
        """An edit's ``addresses``, made at the first asking, kept until ``forget``."""
        known = self._found_by.get(edit.id)
        if known is None or known[0] != edit:
            known = self._found_by[edit.id] = edit, self.addresses(edit.prompt, edit.subject)
        return known[1]

    def cue_size(self) -> float:
        """The size of cues: their strength times the root mean square of an activation that enters
        the edited projection, median over neutral tokens."""
        rows = self._neutral_rows()
        squares = torch.cat([r.activation for r in rows]).float().square().mean(-1)
        return self._config.cue * float(squares.median().sqrt())

    def margins(self) -> Margins:
        """Eq. 5's margins: those given, or the paper's in proportion to the model.

        The unit is the median norm of the edited projection's output over neutral tokens: an
        indicator of beta then stands for a change of about a fifth of that output.
        """
        c = self._config
        if c.alpha is not None and c.beta is not None and c.gamma is not None:
            return Margins(c.alpha, c.beta, c.gamma)
        scale = self.engine.output_norm(self._neutral_rows()) / _PAPER_OUTPUT_NORM
        return Margins(*(scale * m for m in _PAPER_MARGINS))

    def logits(self) -> Tensor:
        """Those of neutral texts by capture and replay, exactly and in half precision, fp32 [2,
        tokens, vocabulary]."""
        return self.engine.unedited([self._prompt(text) for text in neutral_prompts()[:_PROBES]])

    def _neutral_rows(self) -> list[Row]:
        prompts = [self._prompt(text) for text in neutral_prompts()[:_SAMPLE]]
        return self.engine.capture(prompts, [[]] * len(prompts))

    def _capture(self, edit: Edit) -> Practice:
        c = self._config
        target = encode_target(self._tokenizer, edit.target_new, stop=True, chat=c.chat_template)
        rng = random.Random(draw_seed(c.seed, "contexts", edit.id))
        drawn = rng.sample(self._contexts, min(c.contexts_per_edit, len(self._contexts)))
        texts = [edit.prompt, *(in_context(text, edit.prompt) for text in drawn)]
        prompts, targets = [self._prompt(t) for t in texts], [target] * len(texts)
        if c.chat_context and not c.chat_template and has_chat_template(self._tokenizer):
            prompts.append(encode_prompt(self._tokenizer, edit.prompt, chat=True))
            targets.append(encode_target(self._tokenizer, edit.target_new, stop=True, chat=True))
        others = [shorter(edit.prompt, edit.subject, rng) for _ in range(c.shortened)]
        addresses = self.found_by(edit)
        asked = self._index.asks(addresses[0]) if self._index is not None else torch.zeros(0)
        others += self._reworded(edit, asked, rng)
        wordings = [self._prompt(text) for text in others if text is not None]
        unrelated = edit.locality_prompt
        apart: list[list[int]] = []
        if c.margins:
            unrelated = unrelated or self._neutral(edit)
            apart = [self._prompt(unrelated)]
        bare, *unrelated_row = self.engine.capture(
            [prompts[0], *apart], [targets[0], *[[] for _ in apart]]
        )
        rows = self.engine.capture(
            [*prompts[1:], *wordings], [*targets[1:], *[target] * len(wordings)], self.in_half
        )
        contexts = len(prompts) - 1
        return Practice(
            edit=edit,
            bare=bare,
            contexts=rows[:contexts],
            wordings=rows[contexts:],
            unrelated=unrelated_row[0] if apart else None,
            locality_prompt=unrelated,
            addresses=addresses,
            asked=asked,
        )

    def _reworded(self, edit: Edit, asked: Tensor, rng: random.Random) -> list[str]:
        """The edit's question in other forms, where it is recognised."""
        if self._index is None or edit.subject is None or not self._config.reworded:
            return []
        likeness, number = (self._index.relations.known @ asked).max(0)
        if float(likeness) < _RECOGNISED:
            return []
        return reworded(int(number), edit.subject.strip(), self._config.reworded, rng)

    def _about(self, key: TokenKeys, prompt: str, subject: str | None, chat: bool) -> TokenKeys:
        """The key of a prompt that says which tokens name its subject."""
        named = subject_tokens(self._tokenizer, prompt, subject, chat)
        if named is None:
            return key
        return key._replace(subject=torch.tensor(named[-len(key.ids) :]))

    def _neutral(self, edit: Edit) -> str:
        texts = neutral_prompts()
        return texts[draw_seed(self._config.seed, "unrelated", edit.id) % len(texts)]

    def _prompt(self, text: str) -> list[int]:
        return encode_prompt(self._tokenizer, text, chat=self._config.chat_template)


def draw_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on all parts and nothing else."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
