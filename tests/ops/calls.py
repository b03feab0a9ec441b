"""Valid calls of every op, as the raw ops take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def arguments(op: str, make_bank: Callable[..., Any], dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Argument lists for `op` on a bank of 3 shards, [7, 45]."""
    bank = make_bank(3, 7, 45, dtype)
    x, y, weight = torch.randn(5, 45), torch.randn(5, 7), torch.randn(7, 45)
    x, y, weight = (t.to(dtype) for t in (x, y, weight))
    route = torch.tensor([-1, 0, 2, 2, 1], dtype=torch.int32)
    left, right = torch.randn(6, 7).to(dtype), torch.randn(6, 45).to(dtype)
    rank_ptr = torch.tensor([0, 4, 4, 6])
    pair = torch.tensor([0, 2], dtype=torch.int32)
    delta, mask_bits, row_ptr = bank.dense[0].float(), bank.mask_bits[0], bank.row_ptr[:8]
    m = torch.zeros(int(row_ptr[-1]))
    wide, norms = y.float(), y.float().norm(dim=1)
    query = torch.nn.functional.normalize(torch.randn(2, 5, 64), dim=-1)
    keys = torch.randint(-127, 128, (9, 64), dtype=torch.int8)
    scales = 1 / keys.float().norm(dim=1)
    places = torch.tensor([[0, 1, -1], [2, 3, 4], [5, -1, -1], [8, 7, 6]], dtype=torch.int32)
    weights = torch.rand(4, 3)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "add_side_": [(y, x, *bank.tensors, route)],
        "add_side_backward": [(y.float(), *bank.tensors, route, 45)],
        "add_low_rank_": [(y, x, left, right, rank_ptr, route)],
        "dual_linear": [
            (x, weight, None, *bank.tensors, route),
            (x, weight, y[0].clone(), *bank.tensors, route),
        ],
        "side_norm": [(x, *bank.tensors, pair, pair)],
        "sketch_norm": [(x, torch.stack([weight, weight + 1]))],
        "max_sim": [(query, keys, scales, places, weights, 0.1)],
        "dual_linear_train": [(x, y, delta, mask_bits)],
        "dual_linear_train_backward": [
            (y, norms, x, delta, mask_bits, wide, norms, True, True),
            (y, norms, x, delta, mask_bits, wide, norms, False, False),
        ],
        "masked_update_": [
            (delta, weight.float(), mask_bits, row_ptr, m, m + 1, 0.1, 0.9, 0.95, 1e-8, 1, 0.5),
            (delta, weight.float(), mask_bits, row_ptr, None, None, 0.1, 0.9, 0.95, 1e-8, 1, 0.5),
        ],
        "pack": [(weight, mask_bits)],
        "unpack": [(bank.mask_bits[1], bank.values, bank.row_ptr[7:15], 45)],
        "ties_merge": [([delta, weight.float()], [1.0, 2.0], 0.3)],
    }
    return calls[op]
