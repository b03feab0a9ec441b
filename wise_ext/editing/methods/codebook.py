"""GRACE's codebook: keys with a value and a radius each (arXiv 2211.11031, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# An entry closer than this share of the initial radius has the same key: what differs is rounding.
_SAME = 1e-3


class Codebook:
    """Keys k_i, radii epsilon_i, targets y_i and values v_i, in the order they were added.

    Args:
        radius: epsilon_init, the radius of a new entry.

    Attributes:
        keys: fp32 [n, d_key].
        radii: fp32 [n].
        values: fp32 [n, d_value].
        targets: token ids, one tuple an entry.
    """

    def __init__(self, radius: float) -> None:
        self._radius = radius
        self.keys = torch.empty(0, 0)
        self.radii = torch.empty(0)
        self.values = torch.empty(0, 0)
        self.targets: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self.targets)

    def find(self, queries: Tensor) -> Tensor:
        """The entry each query belongs to: the nearest, if the query is within its radius.

        Args:
            queries: [b, d_key].

        Returns:
            int64 [b]; -1 defers to the model. The newer of two entries equally near counts.
        """
        if not len(self):
            return torch.full((len(queries),), -1, device=queries.device)
        distance, entry = self._nearest(queries)
        return torch.where(distance <= self.radii[entry], entry, -1)

    def shared(self, key: Tensor, target: Sequence[int]) -> int | None:
        """The entry that an edit would share, within whose reach and of whose target it is.

        Args:
            key: [d_key].
            target: token ids of the answer.
        """
        if not len(self):
            return None
        distance, entry = self._nearest(key[None])
        near = bool(distance <= self.radii[entry] + self._radius)
        return int(entry) if near and tuple(target) == self.targets[int(entry)] else None

    def admit(self, key: Tensor, target: Sequence[int], value: Tensor) -> int:
        """Take an edit in by Algorithm 1, with d its key's distance from the nearest one.

        *Add*: beyond the reach of that entry (``d > epsilon_i + epsilon_init``) the edit becomes an
        entry of radius ``epsilon_init``. *Expand*: within it and with its target, the entry's
        radius grows to d if it was less, and the value becomes its value. *Split*: within it and
        with another target, the edit becomes an entry, and both radii d / 2. Halves of nothing
        would serve neither, so an edit with the very key of an entry takes it over.

        Args:
            key: [d_key].
            target: token ids of the answer.
            value: [d_value], trained.

        Returns:
            The edit's entry.
        """
        key, value = key.detach().float(), value.detach().float()
        radius = self._radius
        if len(self):
            distances, entries = self._nearest(key[None])
            distance, entry = float(distances), int(entries)
            within = distance <= float(self.radii[entry]) + self._radius
            alike = tuple(target) == self.targets[entry]
            if within and (alike or distance <= _SAME * self._radius):
                self.targets[entry] = tuple(target)
                self.values[entry] = value
                self.radii[entry] = max(distance, float(self.radii[entry]))
                return entry
            if within:
                self.radii[entry] = radius = distance / 2
        return self._add(key, target, value, radius)

    def _add(self, key: Tensor, target: Sequence[int], value: Tensor, radius: float) -> int:
        if len(self):
            self.keys = torch.cat([self.keys, key[None]])
            self.values = torch.cat([self.values, value[None]])
            self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        else:
            self.keys, self.values = key[None].clone(), value[None].clone()
            self.radii = torch.tensor([radius], device=key.device)
        self.targets.append(tuple(target))
        return len(self) - 1

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance [b] to the nearest key, and which one [b] that is."""
        # The differences themselves: expanding the square loses short distances to rounding.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries.float(), self.keys, compute_mode=exact)
        newest_first = distances.flip(1)
        distance, place = newest_first.min(1)
        return distance, len(self) - 1 - place
