"""Which tokens of a batch are real: attention masks of every form transformers passes around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wise_ext.errors import ModelError


def real_tokens(
    mask: Any, batch: int, tokens: int, device: torch.device, past: int | Tensor = 0
) -> Tensor:
    """Mark the real tokens among those a forward pass is given.

    Args:
        mask: None (all real); `[B, past + T]` or `[B, T]`, non-zero for real tokens; `[B or 1,
            heads or 1, T, S]`, bool or additive, where a token is real when it may attend to
            itself; a flex-attention BlockMask; or a dict of such masks by kind of layer.
        batch: B, rows.
        tokens: T, tokens given, pads included.
        device: where the result is wanted.
        past: tokens already in the cache.

    Returns:
        bool `[B, T]`.

    Raises:
        ModelError: a mask of another form.
    """
    if isinstance(mask, dict):
        # Windowed layers mask more than pads, but never the token itself: any entry would do.
        known = [mask.get("full_attention"), *mask.values()]
        mask = next((entry for entry in known if entry is not None), None)
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if hasattr(mask, "mask_mod"):
        rows = torch.arange(batch, device=device).unsqueeze(1)
        columns = torch.arange(tokens, device=device) + past
        seen: Tensor = mask.mask_mod(rows, torch.zeros_like(rows), columns, columns)
        return seen.expand(batch, tokens)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(
            f"cannot tell real tokens from pads by an attention mask of {what}: pass [batch, "
            "tokens] or [batch, 1, tokens, tokens], or force the route with force_route"
        )
    mask = mask.to(device)
    # A windowed cache that is full keeps the given tokens in its last columns.
    last = mask.shape[-1] - tokens
    start = past.to(device).clamp(max=last) if isinstance(past, Tensor) else min(past, last)
    columns = torch.arange(tokens, device=device) + start
    if mask.dim() == 2:
        kept: Tensor = mask.index_select(1, columns)
        return (kept != 0).expand(batch, tokens)
    own = columns.view(1, tokens, 1).expand(mask.shape[0], tokens, 1)
    diagonal: Tensor = mask[:, 0].gather(2, own).squeeze(2)
    if diagonal.dtype.is_floating_point:
        # Additive: 0 where attended, the lowest number (or -inf) where not.
        real = diagonal > torch.finfo(diagonal.dtype).min / 2
    else:
        real = diagonal != 0
    return real.expand(batch, tokens)


def first_tokens(real: Tensor, limits: Tensor) -> Tensor:
    """Keep the first `limits[b]` (int64 `[B]`) real tokens of each row of `real`, bool `[B, T]`."""
    return real & (real.cumsum(1) <= limits.unsqueeze(1))
