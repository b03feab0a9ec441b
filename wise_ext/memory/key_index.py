"""The key index: which stored edit does a prompt resemble?

A prompt's key is the FFN activation of one layer, averaged over its real tokens (``pool_tokens``),
optionally projected to fewer numbers. Keys are compared by the cosine of their whitened forms, so
that directions in which all prompts differ count little. This module is the only place where that
is computed; what it depends on (layer, ridge, background, projection, radius) are parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from wise_ext.errors import ConfigError
from wise_ext.memory.randomness import BitStream

DEFAULT_RIDGE = 1.0
# Cosines closer than fp32 can tell apart are ties, and the latest edit wins them.
_TIE = 1e-5


def pool_tokens(activation: Tensor, real: Tensor) -> Tensor:
    """Average a layer's activation over the real tokens of each row: the raw key.

    Args:
        activation: fp32, bf16 or fp16 ``[B, T, d]``.
        real: bool ``[B, T]``; pads (and whatever they hold) count for nothing.

    Returns:
        fp32 ``[B, d]``; zero for a row without a real token.
    """
    kept = torch.where(real.unsqueeze(-1), activation, 0.0)
    return kept.sum(1, dtype=torch.float32) / real.sum(1, keepdim=True).clamp(min=1)


class Whitening(NamedTuple):
    """The map ``x -> scale * (x' - V diag(shrink) V^T x')`` with ``x' = x - mean``.

    It equals ``(cov + rho I)^(-1/2) (x - mean)`` for ``cov = V diag(lambda) V^T``,
    ``shrink = 1 - sqrt(rho / (lambda + rho))`` and ``scale = rho^(-1/2)``: outside the span of
    ``V`` the covariance is zero, so the square root is ``scale`` there.
    """

    mean: Tensor  # [d]
    basis: Tensor  # [d, r]
    shrink: Tensor  # [r]
    scale: Tensor  # []

    def apply(self, x: Tensor) -> Tensor:
        """Whiten the rows of ``[B, d]``; tensor operations only, rows independent."""
        centred = x - self.mean
        return self.scale * (centred - ((centred @ self.basis) * self.shrink) @ self.basis.T)


def fit_whitening(reference: Tensor, ridge: float) -> Whitening:
    """Fit the whitening of a set of keys, with ``rho = ridge * trace(cov) / d``.

    The eigenvectors come from whichever is smaller, the Gram matrix ``[n, n]`` or the covariance
    ``[d, d]``, in fp64. Keys that do not differ (a single one, say) leave vectors as they are.

    Args:
        reference: fp32 or fp64 ``[n, d]``.
        ridge: > 0.

    Returns:
        fp32 tensors.
    """
    keys = reference.double()
    n, d = keys.shape
    mean = keys.mean(0) if n else keys.new_zeros(d)
    centred = keys - mean
    average = float(centred.square().sum()) / max(1, n * d)
    if n < 2 or average <= 1e-20 * float(keys.square().mean()):
        zeros, none = torch.zeros(d), torch.zeros(0)
        return Whitening(zeros, torch.zeros(d, 0), none, torch.ones(()))
    if n <= d:
        values, vectors = torch.linalg.eigh(centred @ centred.T / n)
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / n)
    # Directions this weak have shrink ~ 0, and their vectors would be rounding noise.
    strong = values > 1e-10 * values[-1]
    values, vectors = values[strong], vectors[:, strong]
    basis = centred.T @ vectors / (n * values).sqrt() if n <= d else vectors
    rho = ridge * average
    shrink = 1.0 - (rho / (values + rho)).sqrt()
    scale = torch.tensor(rho**-0.5, dtype=torch.float32)
    return Whitening(mean.float(), basis.float().contiguous(), shrink.float(), scale)


class PreparedKeys(NamedTuple):
    """All that a comparison needs, as tensors."""

    projection: Tensor  # [dim, width]; [dim, 0] where keys are not projected
    whitening: Whitening
    keys: Tensor  # [n, width], whitened, of length 1
    shards: Tensor  # int32 [n]

    def match(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest of ``n >= 1`` stored keys; tensor operations only, rows independent.

        Args:
            query: raw keys, fp32 ``[B, dim]``.

        Returns:
            The cosine, fp32 ``[B]``, and the stored row, int64 ``[B]`` (of equally near ones the
            one stored last).
        """
        if self.projection.shape[1] > 0:
            query = query @ self.projection
        cosines = normalize(self.whitening.apply(query), dim=-1) @ self.keys.T
        best = cosines.amax(-1)
        order = torch.arange(self.keys.shape[0], device=query.device)
        near = torch.where(cosines >= best.unsqueeze(-1) - _TIE, order, 0)
        return best, near.amax(-1)


class KeyIndex:
    """The stored keys of a memory's edits and the shard each belongs to.

    Keys are kept as they were measured (after the projection). With a ``background`` the
    statistics are the background's alone: no edit then moves another's distances, and one radius
    serves ten edits and ten thousand. Without one they are those of the stored keys, computed
    when first needed after a change.

    Args:
        dim: length of a raw key.
        ridge: > 0; how strongly the covariance is pulled towards a multiple of the identity.
        background: raw keys of neutral prompts, ``[m, dim]``: they shape the statistics and are
            never matched.
        projection: project keys to this many numbers by random signs; 0 keeps them whole.
        projection_seed: seed of the signs.

    Raises:
        ConfigError: ridge or projection out of range.
        ValueError: the background does not fit.
    """

    def __init__(
        self,
        dim: int,
        ridge: float = DEFAULT_RIDGE,
        background: Tensor | None = None,
        projection: int = 0,
        projection_seed: int = 0,
    ) -> None:
        if not ridge > 0.0:
            raise ConfigError(f"key index ridge is {ridge}: give a number above 0")
        if not 0 <= projection <= dim:
            raise ConfigError(f"key projection is {projection}: give 0 (none) up to {dim}")
        self.dim = dim
        self.ridge = float(ridge)
        self.projection = projection
        self.projection_seed = projection_seed
        self._signs = _random_signs(dim, projection, projection_seed)
        self.ids: list[str] = []
        self.keys = torch.zeros(0, self.width)
        self.shards = torch.zeros(0, dtype=torch.int32)
        self.background = self.keys if background is None else self._stored(background)
        self._prepared: PreparedKeys | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """Length of a stored key."""
        return self.projection or self.dim

    def add(self, keys: Tensor, shards: Tensor | Sequence[int], ids: Sequence[str]) -> None:
        """Store keys; an edit may have several.

        Args:
            keys: raw keys ``[n, dim]``.
            shards: the shard of each, ``[n]``, >= 0.
            ids: the edit of each.

        Raises:
            ValueError: lengths differ, a shard is negative, or a key is not finite.
        """
        stored = self._stored(keys)
        numbers = torch.as_tensor(shards, dtype=torch.int32).cpu().flatten()
        if not len(stored) == len(numbers) == len(ids):
            raise ValueError(f"{len(stored)} keys, {len(numbers)} shards and {len(ids)} ids")
        if bool((numbers < 0).any()):
            raise ValueError("a key belongs to a shard >= 0")
        self.keys = torch.cat([self.keys, stored])
        self.shards = torch.cat([self.shards, numbers])
        self.ids = [*self.ids, *ids]
        self._prepared = None

    def remove(self, edit_id: str) -> int:
        """Forget all keys of an edit and return how many there were."""
        before = len(self)
        self._keep([name != edit_id for name in self.ids])
        return before - len(self)

    def renumber(self, new_shard: Sequence[int]) -> None:
        """Give shard ``i`` the number ``new_shard[i]``; -1 forgets its keys."""
        if len(self):
            table = torch.tensor(list(new_shard), dtype=torch.int32)
            self.shards = table[self.shards.long()]
            self._keep((self.shards >= 0).tolist())

    def prepare(self) -> PreparedKeys:
        """Return what comparisons need, on the CPU; cached until the stored set changes."""
        if self._prepared is None:
            reference = self.background if len(self.background) else self.keys
            whitening = fit_whitening(reference, self.ridge)
            keys = normalize(whitening.apply(self.keys), dim=-1)
            self._prepared = PreparedKeys(self._signs, whitening, keys, self.shards)
        return self._prepared

    def nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the stored key nearest to each raw query ``[B, dim]``.

        Returns:
            The cosine, fp32 ``[B]``, and the stored row, int64 ``[B]``, both on the CPU.

        Raises:
            ValueError: the index is empty.
        """
        if not len(self):
            raise ValueError("the key index is empty")
        return self.prepare().match(query.detach().cpu().float())

    def state_tensors(self) -> dict[str, Tensor]:
        """Return ``keys``, ``shards`` and ``background``."""
        return {"keys": self.keys, "shards": self.shards, "background": self.background}

    def state_meta(self) -> dict[str, Any]:
        """Return everything but the tensors, ready for JSON."""
        return {
            "dim": self.dim,
            "ridge": self.ridge,
            "projection": self.projection,
            "projection_seed": self.projection_seed,
            "ids": list(self.ids),
        }

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> KeyIndex:
        """Restore an index from ``state_tensors`` and ``state_meta``.

        Raises:
            ValueError: a tensor does not fit the rest.
        """
        index = cls(
            meta["dim"],
            meta["ridge"],
            projection=meta["projection"],
            projection_seed=meta["projection_seed"],
        )
        keys, shards, background = (tensors[name] for name in ("keys", "shards", "background"))
        for name, tensor in (("keys", keys), ("background", background)):
            if tensor.dtype != torch.float32 or tensor.shape[1:] != (index.width,):
                raise ValueError(f"key index: {name} must be fp32 [n, {index.width}]")
        if shards.dtype != torch.int32 or shards.shape != (len(meta["ids"]),):
            raise ValueError("key index: shards must be int32, one for each id")
        if len(keys) != len(shards):
            raise ValueError(f"key index: {len(keys)} keys for {len(shards)} ids")
        index.keys, index.shards, index.background = keys, shards, background
        index.ids = [str(name) for name in meta["ids"]]
        return index

    def _stored(self, keys: Tensor) -> Tensor:
        raw = keys.detach().cpu().float()
        if raw.dim() != 2 or raw.shape[1] != self.dim:
            raise ValueError(f"keys must be [n, {self.dim}], got {list(keys.shape)}")
        if not bool(raw.isfinite().all()):
            raise ValueError("a key is not finite: the model's activations overflow")
        return raw @ self._signs if self.projection else raw.clone()

    def _keep(self, wanted: list[bool]) -> None:
        chosen = torch.tensor(wanted, dtype=torch.bool)
        self.keys, self.shards = self.keys[chosen], self.shards[chosen]
        self.ids = [name for name, keep in zip(self.ids, wanted, strict=True) if keep]
        self._prepared = None


def _random_signs(dim: int, width: int, seed: int) -> Tensor:
    """Return ``[dim, width]`` of random signs over ``sqrt(width)``: lengths keep their mean."""
    positive = torch.from_numpy(BitStream(seed).bernoulli(dim * width, 0.5)).view(dim, width)
    return torch.where(positive, 1.0, -1.0) / math.sqrt(max(1, width))
