"""``wise-ext stats``: second moments of a model's keys, which closed-form editing methods need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .choices import DeviceOption, DtypeOption, ModelArgument
from .console import note, number_of, say, size_name, table
from .files import check_file

if TYPE_CHECKING:
    from torch import Tensor


def stats(
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="A .safetensors file.", show_default=False),
    ],
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            metavar="PATH",
            help="A .txt, .jsonl, .json or .parquet file, a folder of them, or a saved data set."
            "  [a small corpus of our own]",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            help="auto, block numbers or paths of down projections, with commas between or "
            "repeated.  [auto]",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Where to stop.")] = (
        100_000
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run for --out.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Collect the second moments of the keys of FFN layers over a corpus of texts."""
    check_file(out, "--out")
    layers = [name for given in layer or ["auto"] for name in _names(given)]

    from ..editing.corpus import default_corpus, read_corpus

    texts = default_corpus() if corpus is None else read_corpus(corpus)

    from ..editing.progress import counted
    from ..editing.statistics import checkpoint_path, collect
    from ..models import load_model

    network, tokenizer = load_model(model, dtype=dtype, device=device)
    try:
        found = collect(network, tokenizer, layers, texts, tokens=tokens, path=out, resume=resume)
    except KeyboardInterrupt:
        part = checkpoint_path(out)
        kept = f"what was read so far is kept in {part}: run the same command with --resume"
        raise KeyboardInterrupt(
            f"interrupted; {f'{kept} to go on' if part.exists() else 'nothing was kept yet'}"
        ) from None
    say(
        f"{number_of(found.tokens, 'token')} of {number_of(found.corpus['texts'], 'text')} "
        f"({found.corpus['name']}), {number_of(len(found.moments), 'layer')}, "
        f"{size_name(out.stat().st_size)}"
    )
    say(f"saved in {out}", style="green")
    if found.tokens < tokens:
        asked = f"no more than {found.tokens} of the {tokens} tokens asked for"
        note(f"the corpus has {asked}: --corpus takes a larger one")
    with counted("eigenvalues", len(found.moments)) as tick:
        rows = []
        for path in found.moments:
            values = found.spectrum(path, network.device)
            rows.append((path, len(values), *_spread(values)))
            tick(1)
    table(
        "second moments",
        ("layer", "width", "condition", "effective rank"),
        rows,
        right=("width", "condition", "effective rank"),
    )


def _names(layers: str) -> list[str]:
    names = [name.strip() for name in layers.split(",")]
    if not all(names):
        raise ConfigError(f"--layer {layers}: a layer is missing between the commas: name it")
    return names


def _spread(values: Tensor) -> tuple[str, str]:
    """Condition number and effective rank (the exponential of the entropy of the eigenvalues'
    shares; Roy and Vetterli, 2007) of a moment whose eigenvalues are given, smallest first."""
    import torch

    shares = values.clamp_min(0) / values.clamp_min(0).sum()
    rank = math.exp(-float(shares.xlogy(shares).sum()))
    share = float(values[0] / values[-1])
    singular = share < torch.finfo(torch.float32).eps  # what the moments themselves are rounded to
    return "singular" if singular else f"{1 / share:.1e}", f"{rank:.1f}"
