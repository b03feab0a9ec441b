"""``wise-ext serve``: an edited model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .choices import Check, CheckOption, DeviceOption, DtypeOption, ModelArgument
from .console import say


def serve(
    model: ModelArgument,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            metavar="[NAME=]DIR",
            help="A saved memory; may be repeated. Clients choose one as MODEL:NAME.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What clients call the model.  [last part of MODEL]"),
    ] = None,
    batching: Annotated[
        bool,
        typer.Option(
            "--continuous-batching/--one-by-one", help="Answer many requests together, or in turn."
        ),
    ] = True,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--cache-tokens",
            min=1,
            help="Tokens of all requests that are kept.  [16384; on a GPU by its free memory]",
        ),
    ] = None,
    pass_tokens: Annotated[
        int | None,
        typer.Option(
            "--pass-tokens", min=1, help="Tokens of one pass.  [512; on a GPU by its free memory]"
        ),
    ] = None,
    manage: Annotated[
        bool, typer.Option("--manage", help="Clients may load and unload memories.")
    ] = False,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port.")] = 8000,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    check: CheckOption = Check.weights,
) -> None:
    """Serve an edited model to OpenAI's clients; its memories go by name."""
    given = memory or []
    chosen = dict(_named(entry, place) for place, entry in enumerate(given))
    if len(chosen) < len(given):
        raise ConfigError("two memories of one name: write --memory NAME=DIR with different names")
    called = name or Path(model).name

    from ..integrations.packages import require

    for package in ("fastapi", "uvicorn", "pydantic", "openai"):
        require(package, "serve", "serving")

    from ..integrations.serving import check_names, run_server

    check_names(called, chosen)

    from ..editing.loading import load_memory
    from ..models import load_model
    from ..storage import load_memory_dir

    for folder in chosen.values():
        load_memory_dir(folder)  # before the model: a wrong path should cost no waiting
    network, tokenizer = load_model(model, dtype=dtype, device=device)
    for each, folder in chosen.items():
        load_memory(network, folder, each, check)
    say(f"{called} on http://{host}:{port}/v1, with {', '.join(chosen) or 'no memory'}")
    run_server(
        network,
        tokenizer,
        called,
        host=host,
        port=port,
        manage=manage,
        continuous_batching=batching,
        cache_tokens=cache_tokens,
        pass_tokens=pass_tokens,
    )


def _named(entry: str, place: int) -> tuple[str, Path]:
    """A memory's name and folder; one that is given none is called by its folder."""
    name, found, folder = entry.partition("=")
    path = Path(folder if found else entry)
    return (name if found else path.resolve().name or f"memory-{place}"), path
