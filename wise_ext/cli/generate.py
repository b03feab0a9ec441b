"""``wise-ext generate``: ask an edited model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import DataError
from .choices import Check, CheckOption, DeviceOption, DtypeOption, MemoryOption, ModelArgument
from .console import route_name, say


def generate(
    model: ModelArgument,
    memory: MemoryOption,
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", metavar="TEXT", help="May be repeated.", show_default=False),
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")
    ] = 32,
    show_route: Annotated[
        bool, typer.Option("--show-route", help="Say which memory answered.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    check: CheckOption = Check.weights,
) -> None:
    """Continue prompts greedily with an edited model."""
    if not all(text.strip() for text in prompt):
        raise DataError("--prompt is empty: write a prompt")

    from ..evaluation import generate_answers
    from .opening import open_edited

    network, tokenizer, chat = open_edited(model, memory, device=device, dtype=dtype, check=check)
    answers = generate_answers(network, tokenizer, prompt, chat=chat, max_new_tokens=max_new_tokens)
    for text, answer in zip(prompt, answers, strict=True):
        say(text, style="bold")
        route = f"  [{route_name(answer.route)}]" if show_route else ""
        say(answer.text.strip() + route)
