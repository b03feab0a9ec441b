"""EasyEdit's adapter for `bench.overhead`: its own class on the same projection, dense memories."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import peer_easyedit
from bench.made_memory import made_shards
from bench.peer_easyedit import PeerError
from wise_ext.memory import Shard

_SILENT = 1e9  # an activation that nothing reaches


class PeerAdapters:
    """Makes adapters of a user's clone.

    Args:
        clone: its folder.

    Raises:
        PeerError: the folder is no such clone, or its code is not what this bench knows.
    """

    def __init__(self, clone: Path) -> None:
        code = peer_easyedit.load(clone)
        module = importlib.import_module(code.main.__name__.rpartition(".")[0] + ".WISE")
        for wanted in ("WISEAdapter", "EditingMeanAct"):
            if not hasattr(module, wanted):
                raise PeerError(f"WISE.py of {clone} has no {wanted}: check out commit 14cea82")
        self._module: Any = module
        self.hparams = code.hparams.WISEHyperParams.from_hparams(str(code.settings))
        self.hparams.retrieve = True

    @contextmanager
    def attached(self, model: Any, layer: str, count: int, routed: bool) -> Iterator[None]:
        """The model with so many retrieved memories, whose thresholds everything or nothing
        passes; the projection that it came with is back afterwards."""
        path, _, name = layer.rpartition(".")
        parent, base = model.get_submodule(path), model.get_submodule(layer)
        weight = base.weight
        assert isinstance(weight, Tensor)
        needs, weight.requires_grad = weight.requires_grad, False
        self.hparams.hidden_act = getattr(model.config, "hidden_act", "silu")
        adapter = self._module.WISEAdapter(self.hparams, base, transpose=True)
        adapter.editing_mean_act = self._module.EditingMeanAct(min_a=_SILENT)
        shape = (weight.shape[0], weight.shape[1])
        adapter.memory_weight = [weight + shard.dense() for shard in self._shards(shape, count)]
        level = 0.0 if routed else _SILENT
        adapter.memory_mean_act = [self._module.EditingMeanAct(min_a=level) for _ in range(count)]
        setattr(parent, name, adapter)
        try:
            yield
        finally:
            setattr(parent, name, base)
            weight.requires_grad = needs

    @staticmethod
    def _shards(shape: tuple[int, int], count: int) -> list[Shard]:
        return made_shards(shape, count, 0.2)


def check(model: nn.Module, bare: nn.Module, ids: Tensor, routed: bool) -> bool:
    """Whether the adapter answers as it should: with the bare model's logits, or other ones."""
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)
    return same != routed
