"""The key index: which stored edit does a prompt ask for?

Late interaction: every stored edit keeps the keys of its prompt's tokens, and its score for a query
is the weighted mean, over those tokens, of the best cosine any token of the query reaches. What
else the query says costs nothing, so an edit is found behind a system prompt or a conversation.
Tokens weigh by how few texts hold them: a name counts, the wording of the question hardly does.
Where an edit says what its subject is, that name alone has weight, and what is asked about it is
compared apart.
This module decides what is stored, ``weighing`` what it counts, ``matching`` how it is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from wise_ext.errors import ConfigError
from wise_ext.memory.cues import NO_CUE
from wise_ext.memory.matching import PreparedKeys
from wise_ext.memory.relations import RelationMap, around, fit_relations
from wise_ext.memory.token_keys import TokenKeys, TokenMap, random_signs, standardise
from wise_ext.memory.weighing import rarity, weigh

# Stored keys that are compared with new ones at a time.
_CHUNK = 65536
# Tokens of an edit that are kept: its subject's, then the rarest.
_STORED = 16


class KeyIndex:
    """The stored edits of a memory, each with its token keys and its shard.

    An edit may be stored in several wordings: as many entries, all with its id.

    Args:
        dim: length of an activation.
        background: tokens of neutral texts, one entry a text. They say how activations vary and
            how common a token is; they are never matched. Stored edits count as texts, too.
        relations: by known relation, wordings of it about some subject, which they say. Without
            them, an edit is found by whatever is asked about its subject.
        width: length of a key; pairs of activations that are longer are projected by random signs.
        seed: of the signs.

    Raises:
        ConfigError: the width is not positive.
        ValueError: the background does not fit, or a wording is nothing but its subject.
    """

    def __init__(
        self,
        dim: int,
        background: Sequence[TokenKeys] = (),
        relations: Sequence[Sequence[TokenKeys]] = (),
        width: int = 512,
        seed: int = 0,
    ) -> None:
        if width < 1:
            raise ConfigError(f"key width is {width}: give a positive number")
        self.dim = dim
        self.seed = seed
        self._signs = random_signs(2 * dim, width, seed)
        self._asked_width = width
        texts = [self._checked(tokens) for tokens in background]
        seen = torch.cat([t.activation for t in texts]) if texts else torch.zeros(0, dim)
        self.mean, self.scale = standardise(seen)
        self.texts = len(texts)
        common = Counter(token for t in texts for token in set(t.ids.tolist()))
        self.common = torch.tensor(sorted(common.items()), dtype=torch.int64).view(-1, 2)
        self.relations = fit_relations(
            [[self._checked(text) for text in wordings] for wordings in relations], self.map
        )
        self.ids: list[str] = []
        self.asked = torch.zeros(0, self.relations.project.shape[1], dtype=torch.int8)
        self.named = torch.zeros(0, dtype=torch.bool)
        self.shards = torch.zeros(0, dtype=torch.int32)
        self.cues = torch.zeros(0, dtype=torch.int64)
        self.lengths = torch.zeros(0, dtype=torch.int32)
        self.tokens = torch.zeros(0, dtype=torch.int32)
        self.keys = torch.zeros(0, self.width, dtype=torch.int8)
        self._prepared: PreparedKeys | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """Length of a stored key."""
        return self._signs.shape[1] or 2 * self.dim

    @property
    def map(self) -> TokenMap:
        """How an activation becomes a key."""
        return TokenMap(self.mean, self.scale, self._signs)

    def nbytes(self) -> int:
        """Bytes that the stored edits' keys take."""
        return sum(getattr(self, name).nbytes for name in (*_BY_TOKEN, *_BY_EDIT))

    def add(
        self, prompts: Sequence[TokenKeys], shards: Tensor | Sequence[int], ids: Sequence[str]
    ) -> None:
        """Store edits by their prompts' tokens.

        Args:
            prompts: one an edit, of at least one token; of long ones the subject's, then the
                rarest are kept.
            shards: the shard of each, >= 0.
            ids: the edit of each. One that is there already is stored in another wording, too:
                what it asks is told by the first, so its subject's name is all that is kept.

        Raises:
            ValueError: lengths differ, a shard is negative, or a key is not finite.
        """
        numbers = torch.as_tensor(shards, dtype=torch.int32).cpu().flatten()
        if not len(prompts) == len(numbers) == len(ids):
            raise ValueError(f"{len(prompts)} keys, {len(numbers)} shards and {len(ids)} ids")
        if bool((numbers < 0).any()):
            raise ValueError("a key belongs to a shard >= 0")
        common = dict(self.common.tolist())
        tokens, keys, named, asked = [self.tokens], [self.keys], [self.named], [self.asked]
        known = {name: self.asked[i : i + 1] for i, name in enumerate(self.ids)}
        for name, prompt in zip(ids, map(self._checked, prompts), strict=True):
            if not len(prompt.ids):
                raise ValueError("a prompt without tokens has no key")
            subject = prompt.named()
            seen = torch.tensor([common.get(token, 0) for token in prompt.ids.tolist()])
            seen[subject] = -1  # before the rarest
            kept = seen.argsort(stable=True)[:_STORED].sort().values
            if name in known and bool(subject.any()):
                kept = kept[subject[kept]]
            real = torch.ones(1, len(prompt.ids), dtype=torch.bool)
            key = self.map.apply(prompt.activation[None], real)[0, kept]
            keys.append(_eight_bits(key))
            tokens.append(prompt.ids[kept].to(torch.int32))
            named.append(subject[kept])
            if name not in known:
                known[name] = _eight_bits(self.asks(prompt).unsqueeze(0))
            asked.append(known[name])
        self.keys, self.tokens = torch.cat(keys), torch.cat(tokens)
        self.named, self.asked = torch.cat(named), torch.cat(asked)
        lengths = [self.lengths, torch.tensor([len(t) for t in tokens[1:]], dtype=torch.int32)]
        self.lengths = torch.cat(lengths)
        self.shards = torch.cat([self.shards, numbers])
        self.cues = torch.cat([self.cues, torch.full((len(ids),), NO_CUE)])
        self.ids = [*self.ids, *ids]
        self._prepared = None

    def add_worded(
        self, edits: Sequence[Sequence[TokenKeys]], shards: Sequence[int], ids: Sequence[str]
    ) -> None:
        """Store edits in one or more wordings each; otherwise as ``add``."""
        triples = zip(edits, shards, ids, strict=True)
        flat = [(key, shard, name) for keys, shard, name in triples for key in keys]
        self.add([key for key, _, _ in flat], [s for _, s, _ in flat], [n for _, _, n in flat])

    def asks(self, prompt: TokenKeys) -> Tensor:
        """What a prompt asks about its subject, as it is stored: a direction, fp32 ``[r]``, to be
        compared with ``relations.known``; zero where it does not say which tokens are the
        subject's, or nothing else is near them."""
        named = prompt.named().unsqueeze(0)
        tokens = self.map.tokens(prompt.activation[None], torch.ones_like(named))
        asked = self.relations.apply(tokens, around(named, torch.ones_like(named)))[0]
        return normalize(_eight_bits(asked).float(), dim=-1)

    def stored_asks(self) -> dict[str, Tensor]:
        """What every stored edit asks, by id; see ``asks``."""
        rows = normalize(self.asked.float(), dim=-1)
        return dict(zip(self.ids, rows, strict=True))

    def remove(self, edit_id: str) -> int:
        """Forget an edit in all its wordings and return how many entries there were."""
        before = len(self)
        self._keep([name != edit_id for name in self.ids])
        return before - len(self)

    def place(self, shards: Sequence[int], cues: Sequence[int] | None = None) -> None:
        """Name the shard of every entry, in order, and the number of its cue (None: as it is)."""
        self.shards = torch.tensor(list(shards), dtype=torch.int32)
        if cues is not None:
            self.cues = torch.tensor(list(cues), dtype=torch.int64)
        self._prepared = None

    def reorder(self, ids: Sequence[str]) -> None:
        """Keep the edits named, in this order, each in all its wordings.

        Raises:
            ValueError: one of them has no key.
        """
        places: dict[str, list[int]] = {}
        for place, name in enumerate(self.ids):
            places.setdefault(name, []).append(place)
        missing = [name for name in ids if name not in places]
        if missing:
            raise ValueError(f"no key of {missing[0]!r}")
        order = [place for name in ids for place in places[name]]
        sizes = self.lengths.tolist()
        for name in _BY_TOKEN:
            tensor = getattr(self, name)
            parts = tensor.split(sizes)
            setattr(self, name, torch.cat([tensor[:0], *(parts[i] for i in order)]))
        for name in _BY_EDIT:
            setattr(self, name, getattr(self, name)[order])
        self.ids = [self.ids[i] for i in order]
        self._prepared = None

    def renumber(self, new_shard: Sequence[int]) -> None:
        """Give shard ``i`` the number ``new_shard[i]``; -1 forgets its keys."""
        if len(self):
            table = torch.tensor(list(new_shard), dtype=torch.int32)
            self.shards = table[self.shards.long()]
            self._keep((self.shards >= 0).tolist())

    def prepare(self) -> PreparedKeys:
        """Return what comparisons need, on the CPU; cached until the stored set changes."""
        if self._prepared is None:
            there = torch.arange(_STORED) < self.lengths.unsqueeze(1)
            place = torch.zeros(len(self), _STORED, dtype=torch.int64)
            place[there] = torch.arange(len(self.tokens))
            number = {name: i for i, name in enumerate(dict.fromkeys(self.ids))}
            edit = torch.tensor([number[name] for name in self.ids], dtype=torch.int64)
            edit = edit.repeat_interleave(self.lengths.long())
            rare = torch.zeros(len(self), _STORED)
            rare[there] = rarity(self.tokens, edit, self.common, self.texts)
            named = self.named[place] & there
            order, weights = weigh(rare, named, there)
            places = torch.where(there, place, -1).gather(1, order).to(torch.int32)
            named = named.gather(1, order)
            scales = _lengths(self.keys).clamp(min=1e-12).reciprocal()
            asked = normalize(self.asked.float(), dim=-1)
            self._prepared = PreparedKeys(
                *self.map,
                *self.relations,
                self.keys,
                scales,
                places,
                weights,
                named,
                asked,
                self.shards,
                self.cues,
            )
        return self._prepared

    def nearest(self, queries: Sequence[TokenKeys]) -> tuple[Tensor, Tensor]:
        """Find the best stored edit for each query.

        Returns:
            The score, fp32 ``[B]``, and the stored row, int64 ``[B]``, both on the CPU.

        Raises:
            ValueError: the index is empty.
        """
        if not len(self):
            raise ValueError("the key index is empty")
        return self.prepare().match(*self._padded(queries))

    def find(self, queries: Sequence[TokenKeys], radius: float, lead: float) -> Tensor:
        """Find the stored edit that each query asks for; see ``PreparedKeys.find``.

        Returns:
            The stored row, int64 ``[B]``, or -1, on the CPU.

        Raises:
            ValueError: the index is empty.
        """
        if not len(self):
            raise ValueError("the key index is empty")
        return self.prepare().find(*self._padded(queries), radius, lead)

    def like(self, prompts: Sequence[TokenKeys], radius: float) -> list[list[str]]:
        """By prompt, the stored edits that it and they could be taken for each other: those that
        score above ``radius``, asked with the prompt or, as if it were stored, with theirs."""
        if not len(self) or not prompts:
            return [[] for _ in prompts]
        asked = self.prepare().scores(*self._padded(prompts), radius)
        both = copy(self)
        both.add(prompts, [0] * len(prompts), [""] * len(prompts))
        prepared = both.prepare()
        weights = prepared.weights[len(self) :]
        keys = prepared.keys_of(torch.arange(len(self), len(both))).flatten(0, 1)
        edit = torch.arange(len(self)).repeat_interleave(self.lengths.long())
        best = torch.zeros(len(keys), len(self))
        for some, theirs in zip(self.keys.split(_CHUNK), edit.split(_CHUNK), strict=True):
            cosines = keys @ normalize(some.float(), dim=-1).T
            best.scatter_reduce_(1, theirs.expand_as(cosines), cosines, "amax")
        asking = (weights.unsqueeze(-1) * best.view(*weights.shape, -1)).sum(1)
        near = torch.maximum(asked, asking) > radius
        names = ((self.ids[i] for i in row.nonzero().flatten().tolist()) for row in near)
        return [list(dict.fromkeys(row)) for row in names]

    def state_tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        relations = {_RELATION + name: t for name, t in self.relations._asdict().items()}
        return {name: getattr(self, name) for name in _TENSORS} | relations

    def state_meta(self) -> dict[str, Any]:
        """Return everything but the tensors, ready for JSON."""
        return {
            "dim": self.dim,
            "width": self._asked_width,
            "seed": self.seed,
            "texts": self.texts,
            "ids": list(self.ids),
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> KeyIndex:
        """Restore an index from ``state_tensors`` and ``state_meta``.

        Raises:
            ValueError: a tensor does not fit the rest.
        """
        index = cls(meta["dim"], width=meta["width"], seed=meta["seed"])
        index.texts = int(meta["texts"])
        index.ids = [str(name) for name in meta["ids"]]
        total, common = (tensors[name].shape[:1].numel() for name in ("keys", "common"))
        map_ = RelationMap(*(tensors[_RELATION + name] for name in RelationMap._fields))
        many, wide = map_.known.shape if map_.known.dim() == 2 else (0, 0)
        fits = {"centre": (index.dim,), "project": (index.dim, wide), "known": (many, wide)}
        for name, tensor in map_._asdict().items():
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != fits[name]:
                raise ValueError(f"key index: relation {name} must be fp32 {list(fits[name])}")
        index.relations = map_
        shapes = {
            "mean": (index.dim,),
            "scale": (index.dim,),
            "common": (common, 2),
            "keys": (total, index.width),
            "named": (total,),
            "tokens": (total,),
            "lengths": (len(index),),
            "shards": (len(index),),
            "cues": (len(index),),
            "asked": (len(index), wide),
        }
        for name, dtype in _TENSORS.items():
            if tensors[name].dtype != dtype or tuple(tensors[name].shape) != shapes[name]:
                raise ValueError(f"key index: {name} must be {dtype} {list(shapes[name])}")
            setattr(index, name, tensors[name])
        outside = (index.lengths < 1) | (index.lengths > _STORED)
        if bool(outside.any()) or int(index.lengths.sum()) != total:
            raise ValueError(f"key index: the lengths do not add up to {total} keys")
        counts = index.common[:, 1]
        if bool((index.cues < 0).any()):
            raise ValueError("key index: the number of a cue is negative")
        if bool(((counts < 1) | (counts > index.texts)).any()):
            raise ValueError(f"key index: a token is common to none or more of {index.texts} texts")
        return index

    def _padded(self, queries: Sequence[TokenKeys]) -> tuple[Tensor, Tensor]:
        rows = [self._checked(query) for query in queries]
        width = max(len(row.ids) for row in rows)
        activation = torch.zeros(len(rows), width, self.dim)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            activation[i, : len(row.ids)] = row.activation
            real[i, : len(row.ids)] = True
        return activation, real

    def _checked(self, tokens: TokenKeys) -> TokenKeys:
        ids, raw = tokens.ids.detach().cpu(), tokens.activation.detach().cpu().float()
        if raw.dim() != 2 or raw.shape != (len(ids), self.dim):
            raise ValueError(f"keys must be [{len(ids)}, {self.dim}], got {list(raw.shape)}")
        if not bool(raw.isfinite().all()):
            raise ValueError("a key is not finite: the model's activations overflow")
        subject = None if tokens.subject is None else tokens.subject.detach().cpu()
        if subject is not None and (subject.dtype != torch.bool or subject.shape != ids.shape):
            raise ValueError(f"subject must be bool [{len(ids)}], got {list(subject.shape)}")
        return TokenKeys(ids, raw, subject).last()

    def _keep(self, wanted: list[bool]) -> None:
        chosen = torch.tensor(wanted, dtype=torch.bool)
        each = chosen.repeat_interleave(self.lengths.long())
        for name in _BY_TOKEN:
            setattr(self, name, getattr(self, name)[each])
        for name in _BY_EDIT:
            setattr(self, name, getattr(self, name)[chosen])
        self.ids = [name for name, keep in zip(self.ids, wanted, strict=True) if keep]
        self._prepared = None


def _eight_bits(rows: Tensor) -> Tensor:
    """int8 ``[m, width]``. Only directions are compared, so a row needs no scale of its own."""
    if not rows.shape[-1]:
        return rows.to(torch.int8)
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (rows / largest * 127).round().to(torch.int8)


def _lengths(rows: Tensor) -> Tensor:
    """The length of each of int8 ``[M, width]``, fp32 ``[M]``."""
    parts = [torch.linalg.vector_norm(some.float(), dim=-1) for some in rows.split(_CHUNK)]
    return torch.cat([torch.zeros(0), *parts])


_BY_TOKEN = ("keys", "named", "tokens")
_BY_EDIT = ("lengths", "shards", "asked", "cues")
_RELATION = "relation_"
_TENSORS = {
    "mean": torch.float32,
    "scale": torch.float32,
    "common": torch.int64,
    "keys": torch.int8,
    "named": torch.bool,
    "tokens": torch.int32,
    "lengths": torch.int32,
    "shards": torch.int32,
    "cues": torch.int64,
    "asked": torch.int8,
}
