"""The side memory of one edited layer: its shards, and how prompts find them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wise_ext.errors import ConfigError
from wise_ext.memory import bank_form, low_rank_form
from wise_ext.memory.bank import PackedBank
from wise_ext.memory.column_bank import Bank
from wise_ext.memory.cues import Cues
from wise_ext.memory.key_index import KeyIndex
from wise_ext.memory.low_rank import LowRankBank, LowRankShard
from wise_ext.memory.masks import bool_to_bits
from wise_ext.memory.merging import DEFAULT_DENSITY, merge
from wise_ext.memory.mixed_bank import MixedBank
from wise_ext.memory.packed import Packed
from wise_ext.memory.routing import IndicatorRouter, KeyRouter, Router
from wise_ext.memory.shards import Shard

ROUTINGS = ("key", "indicator")
VARIANTS = ("retrieve", "merge")
STORED = ("exact", "int8")
_KEYS = "key_index."


@dataclass(eq=False)
class SideMemory:
    """All that was learned about one down projection; plain tensors, no model.

    Attributes:
        layer: module path of the edited down projection.
        shape: its ``(d_out, d_in)``.
        shards: sealed shards, packed or of low rank; a shard's route is its place in this list.
        routing: ``"key"`` (nearest stored key) or ``"indicator"`` (the paper, Eq. 3-6).
        key_layer: module path of the projection whose input is the key; before ``layer`` or it.
        key_index: the stored keys.
        radius: score above which a prompt may belong to a stored edit.
        lead: see ``KeyRouter``.
        cue: size of the cue that enters a shard with a prompt's edit (``cues.Cues``); 0 for none.
        variant: ``"retrieve"`` (shards stay apart) or ``"merge"`` (full ones are merged).
        stored: ``"exact"`` or ``"int8"``: what the shards' values are rounded to on disk.

    Raises:
        ConfigError: routing, variant or stored unknown, key routing without layer and index, or a
            low-rank shard without key routing (its indicator says nothing about prompts).
        ValueError: a shard of another shape or dtype than the rest.
    """

    layer: str
    shape: tuple[int, int]
    shards: list[Shard | LowRankShard] = field(default_factory=list)
    routing: str = "key"
    key_layer: str | None = None
    key_index: KeyIndex | None = None
    radius: float = 0.6
    variant: str = "retrieve"
    lead: float = 3.0
    cue: float = 0.0
    stored: str = "exact"
    _packed: dict[torch.dtype, Packed] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ConfigError(f"unknown router {self.routing!r}: choose one of {ROUTINGS}")
        if self.variant not in VARIANTS:
            raise ConfigError(f"unknown variant {self.variant!r}: choose one of {VARIANTS}")
        if self.stored not in STORED:
            raise ConfigError(f"stored is {self.stored!r}: choose one of {STORED}")
        if self.routing == "key" and (self.key_layer is None or self.key_index is None):
            raise ConfigError("key routing needs key_layer and key_index")
        if not math.isfinite(self.radius):
            raise ConfigError(f"the key radius is {self.radius}: give a score in [0, 1]")
        if not math.isfinite(self.lead):
            raise ConfigError(f"the lead is {self.lead}: give a number in [0, 3]")
        if not 0 <= self.cue < math.inf:
            raise ConfigError(f"the cue is {self.cue}: give a number >= 0")
        self.shape = (int(self.shape[0]), int(self.shape[1]))
        for shard in self.shards:
            self._check(shard)

    @property
    def edit_ids(self) -> list[str]:
        """All edits, shard by shard."""
        return [name for shard in self.shards for name in shard.edit_ids]

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the packed size of all shards in bytes, with values of ``dtype``."""
        return sum(shard.nbytes(dtype) for shard in self.shards)

    def rounding(self) -> float:
        """Return by how much ``stored`` puts the packed shards' values off: the root mean square of
        the differences over that of the values."""
        masked, _ = self._by_kind()
        if self.stored == "exact" or not any(shard.nnz for shard in masked):
            return 0.0
        bank = self._packed_bank(masked, torch.float32)
        rounded = bank_form.from_bytes(*bank_form.to_bytes(bank.values, bank.row_ptr), bank.row_ptr)
        size = float(bank.values.norm())
        return float((rounded - bank.values).norm()) / size if size else 0.0

    def shard_of(self, edit_id: str) -> int | None:
        """Return the shard that holds an edit, or None."""
        for index, shard in enumerate(self.shards):
            if edit_id in shard.edit_ids:
                return index
        return None

    def bank(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> PackedBank | MixedBank:
        """Return the bank of all shards; see ``PackedBank.from_shards``.

        Packed banks of one dtype on the CPU share their tensors for as long as shards are only
        added, which copies none of those there are (but now and then, for room); and those of a
        stored memory's own dtype lie where its file is mapped: however many models use a memory,
        it is there once.
        """
        masked, low = self._by_kind()
        packed = self._packed_bank(masked, dtype, device)
        if not low:
            return packed
        is_low = [isinstance(shard, LowRankShard) for shard in self.shards]
        factors = LowRankBank.from_shards(low, self.shape, dtype, device)
        return MixedBank(packed, factors, is_low)

    def _by_kind(self) -> tuple[list[Shard], list[LowRankShard]]:
        """The packed shards and those of low rank, each in order."""
        masked = [shard for shard in self.shards if isinstance(shard, Shard)]
        return masked, [shard for shard in self.shards if isinstance(shard, LowRankShard)]

    def _packed_bank(
        self, shards: list[Shard], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> PackedBank:
        if torch.device(device).type != "cpu":
            return PackedBank.from_shards(shards, self.shape, dtype, device)
        packed = self._packed.get(dtype)
        if packed is None or not packed.begins(shards):
            packed = Packed.of(self.shape, dtype)
        self._packed[dtype] = packed = packed.grown(shards)
        return PackedBank(*packed.tensors(), self.shape)

    def router(self, bank: Bank | None = None) -> Router | None:
        """Return the router of the memory as it is now, or None where there is no shard.

        Args:
            bank: a bank of these shards for the indicator router to share; by default it makes
                an fp32 one of its own. A key router needs none.
        """
        if not self.shards:
            return None
        if self.routing == "key" and self.key_layer is not None and self.key_index is not None:
            cues = Cues(self.cue, self.shape[1]) if self.cue else None
            return KeyRouter(self.key_layer, self.key_index, self.radius, self.lead, cues)
        thresholds = [shard.threshold for shard in self.shards]
        packed = bank or self.bank()
        assert not isinstance(packed, MixedBank)  # _check has seen to it
        return IndicatorRouter(self.layer, packed, thresholds)

    def add_shard(self, shard: Shard | LowRankShard) -> int:
        """Append a shard and return its route.

        Raises:
            ValueError: its shape or dtype is not that of the memory.
        """
        self._check(shard)
        self.shards.append(shard)
        return len(self.shards) - 1

    def replace_shard(self, index: int, shard: Shard | LowRankShard) -> None:
        """Put a rebuilt shard in the place of another; keys keep pointing there.

        Raises:
            ValueError: its shape or dtype is not that of the memory.
        """
        self._check(shard)
        self.shards[index] = shard

    def remove_shard(self, index: int) -> None:
        """Drop a shard and its keys; later shards move up by one."""
        del self.shards[index]
        if self.key_index is not None:
            count = len(self.shards) + 1
            self.key_index.renumber([i - (i > index) if i != index else -1 for i in range(count)])

    def merge_shards(
        self,
        indices: Sequence[int],
        method: str = "ties",
        weights: Sequence[float] | None = None,
        density: float = DEFAULT_DENSITY,
        threshold: float | None = None,
        seed: int = 0,
    ) -> int:
        """Merge shards into one (WISE-Merge), which takes the first one's place.

        The new mask is where the merged delta is not zero. Keys of the merged shards point to the
        new one; the other shards close up.

        Args:
            indices: distinct shards, at least one, in the order of ``weights``.
            method: see ``merging.merge``, also for ``weights``, ``density`` and ``seed``.
            weights: one a shard.
            density: share of non-zero entries kept.
            threshold: of the new shard; by default the lowest of the merged ones.
            seed: of DARE's dropping.

        Returns:
            The route of the new shard.

        Raises:
            ConfigError: see ``merging.merge``.
            ValueError: no shard named, one named twice, or one that does not exist.
        """
        count = len(self.shards)
        chosen = list(indices)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"name each shard to merge once, got {chosen}")
        if not all(0 <= index < count for index in chosen):
            raise ValueError(f"there are {count} shards, cannot merge {chosen}")
        parts = [self.shards[index] for index in chosen]
        delta = merge([part.dense() for part in parts], method, weights, density, seed)
        low = min(part.threshold for part in parts) if threshold is None else threshold
        ids = [name for part in parts for name in part.edit_ids]
        merged = Shard.from_delta(
            delta.to(parts[0].values.dtype), bool_to_bits(delta != 0), low, ids
        )
        place = min(chosen)
        kept = [i for i in range(count) if i == place or i not in chosen]
        self.shards = [merged if i == place else self.shards[i] for i in kept]
        if self.key_index is not None:
            moved = [kept.index(place if i in chosen else i) for i in range(count)]
            self.key_index.renumber(moved)
        return kept.index(place)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name: the bank (see ``bank_form``) and the key index."""
        masked, low = self._by_kind()
        dtype = masked[0].values.dtype if masked else torch.float32
        bank = self._packed_bank(masked, dtype)
        tensors = bank_form.stored(masked, bank, self.stored == "int8")
        if low:
            tensors |= low_rank_form.stored(low)
        if self.key_index is not None:
            for name, tensor in self.key_index.state_tensors().items():
                tensors[_KEYS + name] = tensor
        return tensors

    def state_meta(self) -> dict[str, Any]:
        """Return everything but the tensors, ready for JSON."""
        return {
            "layer": self.layer,
            "shape": list(self.shape),
            "routing": self.routing,
            "key_layer": self.key_layer,
            "radius": self.radius,
            "variant": self.variant,
            "lead": self.lead,
            "cue": self.cue,
            "stored": self.stored,
            "shards": [_described(shard) for shard in self.shards],
            "key_index": None if self.key_index is None else self.key_index.state_meta(),
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> SideMemory:
        """Restore a memory from ``state_tensors`` and ``state_meta``.

        Raises:
            ValueError: something does not fit (a name of ``tensors`` or ``meta`` that is missing
                is a ``KeyError``).
        """
        d_out, d_in = (int(size) for size in meta["shape"])
        entries = meta["shards"]
        masked = [entry for entry in entries if "rank" not in entry]
        mask_bits, values, row_ptr = bank_form.restored(tensors, len(masked), (d_out, d_in))
        packed = []
        for index, entry in enumerate(masked):
            pointers = row_ptr[index * d_out : (index + 1) * d_out + 1]
            packed.append(
                Shard(
                    mask_bits[index],
                    values[int(pointers[0]) : int(pointers[-1])],
                    pointers - pointers[0],
                    d_in,
                    float(tensors["bank.thresholds"][index]),
                    [str(name) for name in entry["edit_ids"]],
                    int(entry["seed"]),
                )
            )
        low = low_rank_form.restored(tensors, [e for e in entries if "rank" in e], (d_out, d_in))
        each: dict[bool, Iterator[Shard | LowRankShard]] = {False: iter(packed), True: iter(low)}
        shards = [next(each["rank" in entry]) for entry in entries]
        key_index = None
        if meta["key_index"] is not None:
            keys = {n.removeprefix(_KEYS): t for n, t in tensors.items() if n.startswith(_KEYS)}
            key_index = KeyIndex.from_state(keys, meta["key_index"])
            if bool(((key_index.shards < 0) | (key_index.shards >= len(shards))).any()):
                raise ValueError(f"key index: a key names none of the {len(shards)} shards")
        memory = cls(
            meta["layer"],
            (d_out, d_in),
            shards,
            meta["routing"],
            meta["key_layer"],
            key_index,
            float(meta["radius"]),
            meta["variant"],
            float(meta["lead"]),
            float(meta["cue"]),
            meta["stored"],
        )
        memory._packed[values.dtype] = Packed(tuple(packed), mask_bits, values, row_ptr)
        return memory

    def _check(self, shard: Shard | LowRankShard) -> None:
        if shard.shape != self.shape:
            raise ValueError(f"the shard is {shard.shape}, {self.layer} is {self.shape}")
        if isinstance(shard, LowRankShard):
            if self.routing != "key":
                raise ConfigError("a low-rank shard is found by its key: use router='key'")
            return
        masked = next((s for s in self.shards if isinstance(s, Shard)), shard)
        if shard.values.dtype != masked.values.dtype:
            raise ValueError(
                f"the shard holds {shard.values.dtype}, the memory {masked.values.dtype}"
            )


def _described(shard: Shard | LowRankShard) -> dict[str, Any]:
    """A shard but for its tensors; its rank tells that it has one."""
    about = {"edit_ids": list(shard.edit_ids), "seed": shard.seed}
    return about | {"rank": shard.rank} if isinstance(shard, LowRankShard) else about
