"""The methods there are, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wise_ext.editing.methods.base import Method
from wise_ext.editing.methods.fine_tuning import ConstrainedFineTuning, ElasticFineTuning
from wise_ext.editing.methods.grace import Grace
from wise_ext.editing.methods.least_squares import (
    AlphaEdit,
    AnyEditAlphaEdit,
    AnyEditMemit,
    Memit,
)
from wise_ext.editing.methods.rome import Rome
from wise_ext.editing.methods.unke import AnyEditUnke, Unke
from wise_ext.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS: dict[str, type[Method[Any]]] = {
    method.name: method
    for method in (
        ConstrainedFineTuning,
        ElasticFineTuning,
        Grace,
        Rome,
        Memit,
        AlphaEdit,
        Unke,
        AnyEditMemit,
        AnyEditAlphaEdit,
        AnyEditUnke,
    )
}


def make_method(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Method[Any]:
    """A method for a model.

    Args:
        name: one of ``METHODS``.
        model: a causal language model without a side memory.
        tokenizer: its tokenizer.
        settings: of the method's configuration; what is left out takes its default.

    Raises:
        ConfigError: an unknown method or setting, a bad value, or the model has a side memory.
        ModelError: the model has no such layer.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    return method(model, tokenizer, method.config_type.from_dict(settings))
