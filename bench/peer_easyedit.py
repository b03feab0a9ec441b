"""A user's own clone of EasyEdit, driven as it is: loading its WISE, editing with it.

Only `easyeditor/models/wise` is imported, and the three files of `easyeditor/util` that it imports
itself. The packages around them are entered without running their `__init__`, which would import
every editor of EasyEdit with all that they need.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from wise_ext.editing.edits import Edit

# Not "easyeditor": an installed one stays what it is.
_ROOT = "_wise_ext_bench_easyedit"
_WISE = Path("easyeditor", "models", "wise")
HPARAMS = Path("hparams", "WISE", "llama-7b.yaml")
_NEEDED = {
    "utils": ("tokenize", "get_context_templates"),
    "wise_hparams": ("WISEHyperParams",),
    "wise_main": ("apply_wise_to_model",),
}
# Templates of 5 and of 10 tokens, five each: what its `apply_wise_to_model` asks for.
_TEMPLATES = [[5, 5], [10, 5]]


class PeerError(Exception):
    """The clone cannot be used: one line that says why."""


@dataclass(frozen=True)
class Code:
    """The modules of a clone's `models/wise`, and where its hyperparameters are."""

    utils: Any
    hparams: Any
    main: Any
    settings: Path


def load(clone: Path) -> Code:
    """Import the WISE code of a clone of zjunlp/EasyEdit.

    Raises:
        PeerError: the folder is no such clone, or its code is not what this bench knows.
    """
    if not (clone / _WISE / "WISE.py").is_file():
        raise PeerError(
            f"{clone} has no {_WISE / 'WISE.py'}: name the folder of a clone of zjunlp/EasyEdit"
        )
    if not (clone / HPARAMS).is_file():
        raise PeerError(f"{clone} has no {HPARAMS}: check out a commit that has it, as 14cea82")
    for name in [n for n in sys.modules if n == _ROOT or n.startswith(_ROOT + ".")]:
        del sys.modules[name]
    for name, folder in (("", "."), (".models", "models"), (".util", "util")):
        parent = ModuleType(_ROOT + name)
        parent.__path__ = [str(clone / "easyeditor" / folder)]
        sys.modules[parent.__name__] = parent
    importlib.invalidate_caches()
    found = {}
    for name, wanted in _NEEDED.items():
        try:
            with _silence(), _no_bytecode():
                found[name] = importlib.import_module(f"{_ROOT}.models.wise.{name}")
        except Exception as error:  # someone else's code: it may raise anything
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            raise PeerError(f"cannot import {_WISE / name}.py of {clone}: {cause}") from error
        absent = [each for each in wanted if not hasattr(found[name], each)]
        if absent:
            raise PeerError(
                f"{_WISE / name}.py of {clone} has no {absent[0]}: EasyEdit has changed, "
                "check out commit 14cea82"
            )
    return Code(
        utils=found["utils"],
        hparams=found["wise_hparams"],
        main=found["wise_main"],
        settings=clone / HPARAMS,
    )


def commit_of(clone: Path) -> str:
    """The clone's commit, "+changes" where the files used here differ from it."""
    git = ["git", "-C", str(clone)]
    used = [str(_WISE), str(Path("easyeditor", "util")), str(HPARAMS)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        )
        same = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *used], check=False)
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if same.returncode else "")


@dataclass(frozen=True)
class Cost:
    """What one piece of work took: CPU and wall seconds, and optimiser steps."""

    cpu: float
    wall: float
    iterations: int


@contextlib.contextmanager
def clocked(found: list[Cost]) -> Iterator[None]:
    """Append the cost of the block."""
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    handle = register_optimizer_step_post_hook(count)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        handle.remove()
    found.append(Cost(cpu, wall, steps))


class Peer:
    """EasyEdit's WISE on one model, with the values of its `llama-7b.yaml` and one edit a call.

    Args:
        code: a loaded clone.
        model: edited through the peer's adapter, which is only in place within `attached`.
        tokenizer: pads on the left, as EasyEdit sets it up for such models.
        layer: dotted path of the down projection.
        seed: of the peer's mask.
        changes: hyperparameters to set otherwise (tests).
        templates: contexts in place of those the model writes (tests: a random model writes braces,
            which the peer takes for fields).
    """

    def __init__(
        self,
        code: Code,
        model: nn.Module,
        tokenizer: Any,
        layer: str,
        seed: int = 0,
        changes: dict[str, Any] | None = None,
        templates: list[str] | None = None,
    ) -> None:
        self._code, self.model, self._tokenizer = code, model, tokenizer
        self._layer = layer
        parent, _, self._name = layer.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._base: nn.Module = model.get_submodule(layer)
        self._adapter: Any = None
        self._seed: int | None = seed
        self._code.utils.CONTEXT_TEMPLATES_CACHE = templates
        self.device = next(model.parameters()).device
        with _silence():
            self.hparams = code.hparams.WISEHyperParams.from_hparams(str(code.settings))
        # The peer finds its layer by evaluating this as Python.
        path = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", layer)
        self.hparams.inner_params = [f"{path}.weight"]
        self.hparams.device = str(self.device)
        # As its own example script for lifelong editing: the adapter stays from edit to edit.
        self.hparams.sequential_edit = True
        for name, value in (changes or {}).items():
            setattr(self.hparams, name, value)

    def prepare(self) -> Cost:
        """Let the model write the context templates, once for all edits."""
        found: list[Cost] = []
        with clocked(found), _silence(), torch.no_grad():
            self._templates()
        return found[0]

    def edit(self, edit: Edit, unrelated: str) -> Cost:
        """One edit by the peer's entry point."""
        found: list[Cost] = []
        if self._seed is not None:  # the mask is drawn in the first edit, from numpy's global state
            numpy.random.seed(self._seed)
            self._seed = None
        with self.attached(), clocked(found), _silence():
            self._code.main.apply_wise_to_model(
                self.model, self._tokenizer, [self._request(edit, unrelated)], self.hparams
            )
        return found[0]

    def batch(self, edit: Edit, unrelated: str) -> dict[str, Tensor]:
        """The very tensors the peer trains an edit on: ids, mask and labels [rows, width].

        Raises:
            PeerError: the unrelated text occurs in the prompt, which makes the peer weigh tokens.
        """
        tokens, weights, _ = self._code.utils.tokenize(
            [self._request(edit, unrelated)],
            tokenizer=self._tokenizer,
            device=self.device,
            context_templates=self._templates(),
            hparams=self.hparams,
        )
        if any(weight is not None for weight in weights):
            raise PeerError(f"the unrelated text {unrelated!r} occurs in the edit's own prompt")
        return dict(tokens)

    @property
    def weight(self) -> Tensor:
        """The weight [d_out, d_in] the next edit starts from; a copy."""
        source = self._base if self._adapter is None else self._adapter
        name = "weight" if self._adapter is None else "new_weight"
        return getattr(source, name).detach().clone()  # type: ignore[no-any-return]

    @property
    def mask(self) -> Tensor:
        """0/1 for each entry, flat: which the peer trains. There is none before its first edit."""
        mask = self._adapter.weight_mask
        assert isinstance(mask, Tensor)
        return mask

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The model as edited by the peer; the projection it came with is back afterwards."""
        if self._adapter is not None:
            setattr(self._parent, self._name, self._adapter)
        try:
            yield
        finally:
            layer = self._model_layer()
            if layer is not self._base:
                self._adapter = layer
            setattr(self._parent, self._name, self._base)

    def _templates(self) -> list[str]:
        templates: list[str] = self._code.utils.get_context_templates(
            self.model, self._tokenizer, length_params=_TEMPLATES, device=self.device
        )
        return templates

    def _model_layer(self) -> nn.Module:
        layer = getattr(self._parent, self._name)
        assert isinstance(layer, nn.Module)
        return layer

    @staticmethod
    def _request(edit: Edit, unrelated: str) -> dict[str, str]:
        return {"prompt": edit.prompt, "target_new": edit.target_new, "loc_prompt": unrelated}


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """A clone that was looked at is as it was."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The peer prints a line an iteration."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
