"""Where methods have the second moments of keys from: given, a file, or collected once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from wise_ext.editing.corpus import default_corpus
from wise_ext.editing.statistics import KeyStatistics, collect
from wise_ext.errors import ConfigError, ModelError
from wise_ext.models.gguf import cache_folder
from wise_ext.models.loading import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Raised whenever a collection would come out differently, so that old files are not read.
_COLLECTION = 1


def key_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[str],
    given: KeyStatistics | str | Path | None = None,
) -> dict[str, Tensor]:
    """The mean of ``k k^T`` of each layer, by path, fp32 [d_ff, d_ff] on the CPU.

    Args:
        model: unedited.
        tokenizer: the model's.
        layers: full paths of down projections.
        given: statistics or the file of some; None collects over the corpus that comes with this
            package, a minute for a small model, and keeps them in the cache folder (that of
            ``WISE_EXT_CACHE``, else the user's), a file a layer.

    Raises:
        ConfigError: the statistics given are another model's, or lack a layer.
        StorageError: the file is not there, another model's, damaged or lacks a layer.
        ModelError: nothing can be written to the cache folder.
    """
    mark = fingerprint(model)
    if isinstance(given, KeyStatistics):
        if given.base["fingerprint"] != mark:
            raise ConfigError(
                f"the key statistics are those of {given.base['name']!r}, not of this model: "
                "collect statistics of this one"
            )
        missing = [layer for layer in layers if layer not in given.moments]
        if missing:
            raise ConfigError(
                f"the key statistics lack {missing[0]}: collect them with that layer, or leave "
                "them out"
            )
        return {layer: given.moments[layer] for layer in layers}
    if given is not None:
        return KeyStatistics.load(given, mark, layers).moments
    folder = cache_folder() / f"keys-{_COLLECTION}-{mark}"
    files = {layer: folder / f"{layer}.safetensors" for layer in layers}
    missing = [layer for layer, file in files.items() if not file.exists()]
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"cannot write the cache folder {folder}: {error.strerror}; set WISE_EXT_CACHE to "
                "a folder that can be written"
            ) from error
        found = collect(model, tokenizer, missing, default_corpus(), progress=False)
        for layer, moment in found.moments.items():
            replace(found, moments={layer: moment}).save(files[layer])
    return {at: KeyStatistics.load(file, mark, [at]).moments[at] for at, file in files.items()}
