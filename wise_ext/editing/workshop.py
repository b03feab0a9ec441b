"""What an editor works with: the model cut at the edited layer, contexts, margins, the writer."""

from __future__ import annotations

import hashlib
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from wise_ext import ops
from wise_ext._version import __version__
from wise_ext.editing.anyedit_config import AnyEditConfig
from wise_ext.editing.config import WiseConfig
from wise_ext.editing.contexts import sample_contexts
from wise_ext.editing.parts import Parts
from wise_ext.editing.passages import PassageWriter
from wise_ext.editing.practice import Coach, draw_seed
from wise_ext.editing.suffix import SuffixEngine
from wise_ext.editing.wise import WiseWriter
from wise_ext.errors import ConfigError
from wise_ext.memory import Cues, SideMemory
from wise_ext.models.loading import fingerprint
from wise_ext.models.table import get_module, layer_path, projection_shape
from wise_ext.storage.encoding import canonical, encode_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first block still says which token stands where (measured; see docs/architecture.md).
_KEY_BLOCK = 0


class Workshop:
    """Everything that depends on model, tokenizer and settings, and on no edit.

    Raises:
        ModelError: the model's layers are not found, or it cannot be replayed.
        ConfigError: the key layer lies above the edited one, or there is no chat template.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: WiseConfig
    ) -> None:
        self._config = config
        self._layer = layer_path(model, config.layer)
        self._key_layer = _key_layer(model, config, self._layer)
        self._shape = projection_shape(get_module(model, self._layer))
        name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
        self.base = {"name": name or type(model).__name__, "fingerprint": fingerprint(model)}
        training = model.training
        model.eval()
        pad = tokenizer.pad_token_id
        engine = SuffixEngine(model, self._layer, self._key_layer, pad if pad is not None else 0)
        seed = draw_seed(config.seed, "contexts")
        texts = sample_contexts(model, tokenizer, config.contexts, config.context_tokens, seed)
        self.coach = Coach(engine, tokenizer, config, texts)
        self._margins = self.coach.margins() if config.margins else None
        self._texts = texts
        self._index = self.coach.empty_index() if self._key_layer is not None else None
        self._cue = self.coach.cue_size() if self._key_layer is not None else 0.0
        cues = Cues(self._cue, self._shape[1]) if self._cue else None
        self.writer = WiseWriter(self.coach, config, self._shape, self._margins, cues)
        self._tokenizer = tokenizer
        model.train(training)

    def passages(self, config: AnyEditConfig) -> PassageWriter:
        """A writer of edits with answers of any length."""
        engine, half = self.coach.engine, self.coach.in_half
        return PassageWriter(engine, self._tokenizer, config, self._config.chat_template, half)

    def digest(self) -> str:
        """SHA-256 of what steps start from: the contexts, the index, the size of cues, the margins,
        and the logits of neutral texts, exactly and in half precision. Where it is the same, so are
        models, packages and processors, as far as that shows, and what is trained."""
        tensors = self._index.state_tensors() if self._index is not None else {}
        versions = [__version__, torch.__version__, ops.cpu_isa()]
        about = [self.base["fingerprint"], versions, self._cue, self._margins, self._texts]
        data = encode_tensors(tensors | {"logits": self.coach.logits()})
        return hashlib.sha256(canonical(about) + data).hexdigest()

    def check_passages(self) -> None:
        """See that the memory could hold passages beside its other edits.

        Raises:
            ConfigError: it could not.
        """
        c = self._config
        if c.router != "key":
            raise ConfigError(f"anyedit is found by keys: use router='key', not {c.router!r}")
        if not Parts.of(c).apart:
            raise ConfigError("anyedit merges nothing: use variant='retrieve', shards_per_merge=1")

    def empty_memory(self) -> SideMemory:
        """A memory without shards, its key index (if it routes by key) knowing what neutral texts
        and the wordings of known relations look like."""
        return SideMemory(
            layer=self._layer,
            shape=self._shape,
            routing=self._config.router,
            key_layer=self._key_layer,
            key_index=copy(self._index),
            radius=self._config.radius,
            variant=self._config.variant,
            lead=self._config.lead,
            cue=self._cue,
            stored=self._config.stored,
        )


def _key_layer(model: nn.Module, config: WiseConfig, layer: str) -> str | None:
    """The routing key's projection, or None where the indicator routes."""
    if config.router != "key":
        return None
    if config.key_layer != "auto":
        path = layer_path(model, config.key_layer)
    elif config.layer == "auto" or not isinstance(config.layer, str):
        path = layer_path(model, _KEY_BLOCK)
    else:
        path = _earlier(model, layer)
    order = [name for name, _ in model.named_modules()]
    if order.index(path) > order.index(layer):
        if config.key_layer == "auto":
            return layer
        raise ConfigError(
            f"key_layer {path} lies above the edited layer {layer}: the route must be known before"
        )
    return path


def _earlier(model: nn.Module, layer: str) -> str:
    """The counterpart of a hand-named projection in the key's block, or itself."""
    parts = layer.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            parts[i] = str(_KEY_BLOCK)
            path = ".".join(parts)
            return path if _exists(model, path) else layer
    return layer


def _exists(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())
