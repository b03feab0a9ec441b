"""Second moments of the keys of FFN layers over a corpus of texts.

A key k is the activation of one token that enters an FFN's down projection, ``d_ff`` wide. Editing
methods that solve for a weight update in closed form need ``C = E[k k^T]``, uncentred: ROME
(arXiv 2202.05262, Eq. 2), MEMIT (arXiv 2210.07229, Eq. 15, where ``C0`` is a multiple of it) and
AlphaEdit (arXiv 2410.02355, Sec. 3), which projects onto its null space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wise_ext.editing.anatomy import run_until_stopped, watch
from wise_ext.editing.corpus import Corpus
from wise_ext.editing.progress import ProgressCallback, counted
from wise_ext.editing.prompts import encode_prompt
from wise_ext.editing.rows import places_on_grid
from wise_ext.editing.triangles import folded, read_triangles, unfolded, write_triangles
from wise_ext.errors import ConfigError, DataError, ModelError, StorageError
from wise_ext.models.loading import fingerprint
from wise_ext.models.patch import disabled, is_patched
from wise_ext.models.table import get_module, layer_path, projection_shape
from wise_ext.models.weights import device_of
from wise_ext.storage.files import explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KIND = "key statistics"
_UNFINISHED = "unfinished key statistics"
#: Texts of about this many tokens are sorted by length together. Resuming begins at such a chunk.
_CHUNK = 8192
#: How many tokens are lost at most when a run is killed, beside a chunk.
_CHECKPOINT = 24_000


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Uncentred second moments of keys.

    Attributes:
        moments: by layer path, from the lowest layer up: the mean of ``k k^T`` over all tokens,
            fp32 [d_ff, d_ff] on the CPU, symmetric to the bit.
        tokens: how many tokens that is.
        base: ``name`` and ``fingerprint`` of the model.
        corpus: ``name``, ``sha256`` of the texts read, ``texts`` (how many), ``window`` (tokens of
            a text at most).
    """

    moments: dict[str, Tensor]
    tokens: int
    base: dict[str, Any]
    corpus: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageError: the disk refuses; what was there before is unharmed.
        """
        triangles = {layer: folded(moment) for layer, moment in self.moments.items()}
        about = {"tokens": self.tokens, "base": self.base, "corpus": self.corpus}
        write_triangles(Path(path), _KIND, triangles, about | {"layers": list(triangles)})

    @classmethod
    def load(
        cls,
        path: str | Path,
        fingerprint: str | None = None,
        layers: Sequence[str] | None = None,
    ) -> KeyStatistics:
        """Read a file that ``save`` wrote.

        Args:
            path: the file.
            fingerprint: of the model they are for; None takes any model's.
            layers: full paths; None takes all there are. No other is read.

        Raises:
            StorageError: no such file, another model's, another format version, damaged, or it
                lacks a layer; one line says which, and the cure.
        """
        path = Path(path)
        triangles, about = read_triangles(path, _KIND, layers)
        if fingerprint is not None:
            _require_base(path, about["base"], fingerprint)
        order = [layer for layer in about["layers"] if layer in triangles]
        moments = {layer: unfolded(triangles[layer]) for layer in order}
        return cls(moments, about["tokens"], about["base"], about["corpus"])

    def spectrum(self, layer: str, device: torch.device | str = "cpu") -> Tensor:
        """Eigenvalues of a layer's moment, fp64 [d_ff] from the smallest up, on the CPU.

        What is of the order of fp32's rounding (1e-7 of the largest) may come out as zero or less.

        Args:
            layer: one of ``moments``.
            device: where to compute; d_ff = 14336 takes a CPU some minutes.
        """
        values: Tensor = torch.linalg.eigvalsh(self.moments[layer].to(device).double())
        return values.cpu()


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[str | int],
    texts: Iterable[str],
    *,
    tokens: int = 100_000,
    window: int = 512,
    batch_tokens: int = 4096,
    path: str | Path | None = None,
    resume: bool = False,
    progress: bool | ProgressCallback = True,
) -> KeyStatistics:
    """Take the second moments of the keys of some layers over texts, all in one pass.

    Every token of a text counts once and alike, a special one in front (``encode_prompt``) too;
    pads never do. A patched model's statistics are those of the model without its side memory.

    Args:
        model: a causal language model; in fp16 or bf16 its keys are multiplied in fp32. Products
            of a batch are added up in fp64.
        tokenizer: the model's.
        layers: paths or numbers of down projections, or "auto", as ``layer_path`` takes them.
        texts: a ``Corpus``, or any other texts; blank ones are left out.
        tokens: where to stop, in the middle of a text if need be. Fewer, where texts run out.
        window: tokens of a text at most, and no more than the model has positions for.
        batch_tokens: tokens in a batch at most, pads among them; a single text may have more.
        path: where to save. Until all is read, what was read so far lies beside it, in fp64 under
            ``checkpoint_path(path)``.
        resume: go on with the unfinished run of ``path``. With the same texts, settings and
            machine the result is that of an unbroken run, to the bit.
        progress: a bar or none, or a function called with (tokens read, tokens wanted).

    Raises:
        ConfigError: a number is not positive, no layer is named, or ``resume`` without ``path``.
        DataError: the texts are no texts, or there are none.
        ModelError: a layer is not found, or its keys are not finite.
        StorageError: nothing can be saved; there is no unfinished run to resume, one that would be
            lost without ``resume``, or it was of another model, other texts or settings.
    """
    limits = {"tokens": tokens, "window": window, "batch_tokens": batch_tokens}
    for name, value in limits.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: ask for at least one token")
    if resume and path is None:
        raise ConfigError("resume needs the path of the run to go on with")
    paths = _in_order(model, layers)
    limits["window"] = min(window, _positions(model) or window)
    name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    base = {"name": name or type(model).__name__, "fingerprint": fingerprint(model)}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings = {**limits, "layers": paths, "dtype": dtype, "chunk": _CHUNK}
    checkpoint = _Checkpoint(None if path is None else Path(path), base, settings)
    reader = _Reader(tokenizer, texts, limits["window"])
    if resume:
        sums = checkpoint.resume(reader)
    else:
        checkpoint.begin()
        widths = {p: projection_shape(get_module(model, p))[1] for p in paths}
        sums = {p: torch.zeros(d, d, dtype=torch.float64) for p, d in widths.items()}
    with _bare(model), counted("reading", tokens, progress) as tick:
        tick(reader.tokens)
        while chunk := reader.chunk(tokens):
            for batch in _batches(chunk, batch_tokens):
                _add_batch(model, batch, sums)
                tick(sum(map(len, batch)))
            _check_finite(sums)
            checkpoint.offer(reader, sums)
    if not reader.tokens:
        raise DataError(f"{reader.name}: no text with a token in it: give texts to read")
    moments = {p: unfolded((folded(total) / reader.tokens).float()) for p, total in sums.items()}
    corpus = {"window": limits["window"], **reader.texts_read()}
    found = KeyStatistics(moments, reader.tokens, base, corpus)
    if path is not None:
        found.save(path)
        checkpoint.discard()
    return found


def checkpoint_path(path: str | Path) -> Path:
    """Where an unfinished run of ``collect`` keeps what it has: beside ``path``, ``.part``."""
    path = Path(path)
    return path.with_name(f"{path.name}.part")


class _Reader:
    """Texts in order as token ids, and what was read of them so far.

    Attributes:
        name: of the corpus.
        tokens: given out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], window: int
    ) -> None:
        self.name = texts.name if isinstance(texts, Corpus) else "texts"
        self.tokens = 0
        self._tokenizer, self._window = tokenizer, window
        self._texts = self._noted(texts)
        self._count, self._hash = 0, hashlib.sha256()

    def chunk(self, until: int) -> list[list[int]]:
        """The next texts, in order: ``_CHUNK`` tokens and what the last text has beyond them, no
        more than ``until`` altogether; nothing once there is no more."""
        rows: list[list[int]] = []
        end = min(self.tokens + _CHUNK, until)
        while self.tokens < end and (text := next(self._texts, None)) is not None:
            row = self._encode(text)[: until - self.tokens]
            rows.append(row)
            self.tokens += len(row)
        return [row for row in rows if row]

    def skip(self, count: int, tokens: int) -> None:
        """Go to where ``count`` texts have given ``tokens`` tokens."""
        for _ in islice(self._texts, count):
            pass
        self.tokens = tokens

    def texts_read(self) -> dict[str, Any]:
        """Name, number and digest of the texts read so far, each hashed behind its length."""
        return {"name": self.name, "texts": self._count, "sha256": self._hash.hexdigest()}

    def _noted(self, texts: Iterable[object]) -> Iterator[str]:
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise DataError(f"{self.name}: text {number} is a {kind}: give texts")
            if not text.strip():
                continue
            data = text.encode()
            self._count += 1
            self._hash.update(len(data).to_bytes(8, "little") + data)
            yield text

    def _encode(self, text: str) -> list[int]:
        try:
            return encode_prompt(self._tokenizer, text)[: self._window]
        except DataError:  # nothing in it that this tokenizer knows: no reason to stop
            return []


class _Checkpoint:
    """The unfinished run beside a path; does nothing where there is no path."""

    def __init__(self, path: Path | None, base: dict[str, Any], settings: dict[str, Any]) -> None:
        self._target = path
        self._path = None if path is None else checkpoint_path(path)
        self._base, self._settings = base, settings
        self._kept = 0

    def begin(self) -> None:
        """See, before any work, that nothing stands in the way of a new run."""
        if self._path is None or self._target is None:
            return
        if self._target.is_dir():
            raise StorageError(f"{self._target} is a folder: name a file")
        if not self._target.parent.is_dir():
            raise StorageError(f"{self._target}: there is no folder for it: create it first")
        if self._path.exists():
            raise StorageError(
                f"{self._path} holds an unfinished run: go on with --resume, or remove it"
            )

    def resume(self, reader: _Reader) -> dict[str, Tensor]:
        """The sums so far, by layer, fp64 [d_ff, d_ff]; the reader is brought to where they end."""
        path = self._path
        if path is None or not path.exists():
            raise StorageError(f"there is no unfinished run {path}: start without --resume")
        triangles, about = read_triangles(path, _UNFINISHED)
        _require_base(path, about["base"], self._base["fingerprint"])
        for name, value in self._settings.items():
            if about["settings"].get(name) != value:
                raise StorageError(
                    f"{path} was begun with {name} {about['settings'].get(name)}, not {value}: "
                    "give the same settings, or remove it to start anew"
                )
        reader.skip(about["texts"], about["tokens"])
        if reader.texts_read()["sha256"] != about["sha256"]:
            raise StorageError(
                f"{path} was begun with other texts ({about['name']}) than {reader.name}: "
                "give the same corpus, or remove it to start anew"
            )
        self._kept = reader.tokens
        return {layer: unfolded(triangles[layer]) for layer in self._settings["layers"]}

    def offer(self, reader: _Reader, sums: dict[str, Tensor]) -> None:
        """Write the sums, if much was read since the last time."""
        if self._path is None or reader.tokens - self._kept < _CHECKPOINT:
            return
        about = {"base": self._base, "settings": self._settings, "tokens": reader.tokens}
        triangles = {layer: folded(total) for layer, total in sums.items()}
        write_triangles(self._path, _UNFINISHED, triangles, about | reader.texts_read())
        self._kept = reader.tokens

    def discard(self) -> None:
        """Remove it, once all is saved."""
        if self._path is not None:
            with explained("remove", self._path):
                self._path.unlink(missing_ok=True)


def _require_base(path: Path, base: dict[str, Any], fingerprint: str) -> None:
    if base["fingerprint"] != fingerprint:
        raise StorageError(
            f"{path} was made for {base['name']!r} [{base['fingerprint']}], this model is "
            f"[{fingerprint}]: collect statistics of this model"
        )


def _in_order(model: nn.Module, layers: Sequence[str | int]) -> list[str]:
    """Full paths, each once, in the order in which the model runs them."""
    if not layers:
        raise ConfigError("no layer is named: give at least one, or 'auto'")
    wanted = {layer_path(model, layer) for layer in layers}
    return [name for name, _ in model.named_modules() if name in wanted]


def _batches(rows: list[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """Rows of similar length together, at most so many tokens with their pads."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len):
        if batch and (len(batch) + 1) * len(row) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _add_batch(model: nn.Module, batch: list[list[int]], sums: dict[str, Tensor]) -> None:
    """Add the batch's ``k k^T`` to each layer's sum; nothing above the last layer runs."""
    device, width = device_of(model), len(batch[-1])
    # Padded on the right, where causal attention never looks back.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
    *_, last = sums
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for layer in sums:
            module = get_module(model, layer)
            stack.enter_context(watch(module, layer, seen, entering=True, stop=layer == last))
        run_until_stopped(model, ids)
    for layer, total in sums.items():
        # OPT hands its FFN all rows' tokens in one list.
        grid = seen[layer].reshape(-1, len(total))
        keys = grid[places_on_grid([len(row) for row in batch], width, grid.device)].float()
        sums[layer] = total.to(grid.device).add_(keys.T @ keys)


def _check_finite(sums: dict[str, Tensor]) -> None:
    for layer, total in sums.items():
        if not total.diagonal().isfinite().all():
            raise ModelError(f"keys of {layer} are not finite: load the model in fp32 or bf16")


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The model without its side memory, in evaluation mode, without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), disabled(model) if is_patched(model) else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, where it says so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)
