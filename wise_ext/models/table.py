"""Where each architecture keeps its FFN down projections: a table, not code paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from wise_ext.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """Module paths of one family of causal language models.

    Attributes:
        model_types: the `config.model_type` values this entry serves.
        layers: path of the list of transformer blocks, seen from the model with the head.
        down_proj: path of the FFN down projection inside one block.
        norm: path of the norm before the head. None where there is none; OPT variants that
            normalise after each block have the attribute, set to None.
        head: path of the language-model head.
    """

    model_types: tuple[str, ...]
    layers: str
    down_proj: str
    norm: str | None
    head: str = "lm_head"


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"),
        layers="model.layers",
        down_proj="mlp.down_proj",
        norm="model.norm",
    ),
    Architecture(
        ("gemma3",),
        layers="model.language_model.layers",
        down_proj="mlp.down_proj",
        norm="model.language_model.norm",
    ),
    Architecture(
        ("gpt_neox",),
        layers="gpt_neox.layers",
        down_proj="mlp.dense_4h_to_h",
        norm="gpt_neox.final_layer_norm",
    ),
    Architecture(
        ("gptj",), layers="transformer.h", down_proj="mlp.fc_out", norm="transformer.ln_f"
    ),
    Architecture(
        ("gpt2",), layers="transformer.h", down_proj="mlp.c_proj", norm="transformer.ln_f"
    ),
    Architecture(
        ("opt",),
        layers="model.decoder.layers",
        down_proj="fc2",
        norm="model.decoder.final_layer_norm",
    ),
)


def find_architecture(model: nn.Module) -> Architecture:
    """The table's entry for a model.

    Raises:
        ModelError: no entry has the model's `config.model_type`, or the model does not have the
            blocks its entry names (a bare body without the head, for one).
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for entry in ARCHITECTURES:
        if kind in entry.model_types:
            if not isinstance(_submodule(model, entry.layers), nn.ModuleList):
                raise ModelError(
                    f"{type(model).__name__} is of type {kind!r} but has no list of blocks at "
                    f"'{entry.layers}'; load it with its language-model head, or name the layer by "
                    f"hand with its full path{_example(model)}"
                )
            return entry
    known = ", ".join(sorted(name for entry in ARCHITECTURES for name in entry.model_types))
    raise ModelError(
        f"unknown architecture: looked for the model_type {kind!r} of {type(model).__name__} among "
        f"{known}; name the FFN down projection to edit by hand with its full "
        f"path{_example(model)}"
    )


def layer_path(model: nn.Module, layer: str | int = "auto", fraction: float = 5 / 6) -> str:
    """Full dotted path of the down projection to edit.

    Args:
        model: a causal language model.
        layer: "auto" takes the block at `fraction` of the depth (block 24 of 30); an int (or its
            digits as text) names a block, negative ones from the end; any other text is the full
            path of a projection, which works for architectures the table does not have.
        fraction: share of the depth for "auto", in (0, 1].

    Raises:
        ModelError: unknown architecture (unless a path is given), block out of range, or nothing
            that looks like a down projection at the path.
    """
    if isinstance(layer, str) and layer != "auto" and not layer.lstrip("-").isdigit():
        projection_shape(get_module(model, layer))
        return layer
    entry = find_architecture(model)
    blocks = get_module(model, entry.layers)
    depth = len(blocks)  # type: ignore[arg-type]
    if layer == "auto":
        index = min(max(int(depth * fraction + 0.5) - 1, 0), depth - 1)
    else:
        index = int(layer)
        if not -depth <= index < depth:
            raise ModelError(f"layer {index} does not exist: the model has blocks 0 to {depth - 1}")
        index %= depth
    path = f"{entry.layers}.{index}.{entry.down_proj}"
    projection_shape(get_module(model, path))
    return path


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        ModelError: there is none; the message names where the path breaks off.
    """
    module: Any = model
    for depth, name in enumerate(parts := path.split(".")):
        child = getattr(module, name, None) if name else None
        if not isinstance(child, nn.Module):
            where = ".".join(parts[:depth]) or type(model).__name__
            raise ModelError(
                f"{type(model).__name__} has no layer '{path}': '{where}' has no module '{name}'"
                f"{_example(model)}"
            )
        module = child
    return module  # type: ignore[no-any-return]


def projection_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear map: nn.Linear, GPT-2's Conv1D, or a quantised linear.

    Raises:
        ModelError: the module does not say how many features go in and come out.
    """
    for names in (("out_features", "in_features"), ("nf", "nx")):
        d_out, d_in = (getattr(module, name, None) for name in names)
        if isinstance(d_out, int) and isinstance(d_in, int):
            return d_out, d_in
    raise ModelError(
        f"{type(module).__name__} is not a linear projection: it has neither in_features and "
        "out_features nor nx and nf"
    )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _example(model: nn.Module) -> str:
    """Names a projection of this very model that narrows (d_in > d_out), deep in it, if any."""
    candidates = []
    for path, module in model.named_modules():
        try:
            d_out, d_in = projection_shape(module)
        except ModelError:
            continue
        if d_in > d_out and any(part.isdigit() for part in path.split(".")):
            candidates.append(path)
    if not candidates:
        return ""
    return f', for example layer="{candidates[len(candidates) * 5 // 6]}"'
