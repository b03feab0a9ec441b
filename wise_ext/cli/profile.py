"""``wise-ext profile``: where an edited model's time goes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .choices import (
    Check,
    CheckOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
)
from .console import route_name, say, table
from .files import check_file, write_json, write_whole


def profile(
    model: ModelArgument,
    memory: MemoryOption,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is asked.  [neutral text]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the neutral text.")] = 128,
    repeats: Annotated[int, typer.Option(min=3, help="Passes of each kind.")] = 9,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it there.")] = None,
    json: JsonOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    check: CheckOption = Check.weights,
) -> None:
    """Time a prefill and decoding: every block, the routing, the side memory."""
    check_file(png, "--png")
    check_file(json, "--json")
    if png is not None:
        from ..evaluation.profile_plot import require_matplotlib

        require_matplotlib()

    import torch

    from ..editing.prompts import encode_prompt, neutral_prompts
    from ..evaluation import profile as measure
    from .opening import open_edited

    network, tokenizer, chat = open_edited(model, memory, device=device, dtype=dtype, check=check)
    if prompt is None:
        ids = encode_prompt(tokenizer, " ".join(neutral_prompts()))
        ids = (ids * -(-tokens // len(ids)))[:tokens]
    else:
        ids = encode_prompt(tokenizer, prompt, chat)
    found = measure(network, torch.tensor([ids]), repeats=repeats)
    totals = [sum(getattr(p, phase) for p in found.parts) for phase in ("prefill", "decode")]
    table(
        f"{found.tokens} tokens, answered by {route_name(found.route)}",
        ("part", "prefill ms", "share", "ms a token", "share"),
        [
            (
                part.name
                if part.block is None or part.name.startswith("block")
                else f"  {part.name}, in block {part.block}",
                f"{part.prefill:.2f}",
                f"{part.prefill / totals[0]:.1%}",
                f"{part.decode:.3f}",
                f"{part.decode / totals[1]:.1%}",
            )
            for part in found.parts
        ],
        right=("prefill ms", "share", "ms a token"),
    )
    say(
        f"prefill {found.prefill:.1f} ms, {found.prefill_ratio:.3f} times as without the side "
        f"memory; a token {found.decode:.2f} ms, {found.decode_ratio:.3f} times"
    )
    if png is not None:
        from ..evaluation.profile_plot import draw

        write_whole(png, draw(found, f"{model} with {memory.name}"))
    if json is not None:
        write_json(json, asdict(found))
