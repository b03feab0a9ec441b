"""Editors side by side: the same edits, the same questions, one row a method.

Two regimes: ``each`` is the papers' protocol, one edit at a time in the model as it was;
``sequence`` makes all edits one after another and asks at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

from ..editing.anyedit_config import AnyEditConfig
from ..editing.config import WiseConfig
from ..editing.edits import Edit, find_conflicts
from ..editing.ledger import ANYEDIT
from ..editing.ledger import METHODS as SIDE
from ..editing.progress import ProgressCallback, counted
from ..editing.settings import apart
from ..errors import ConfigError
from ..storage.encoding import canonical
from .longform import LongBaseline, baseline_of, evaluate_long
from .metrics import mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]

REGIMES = ("each", "sequence")
#: The row of the model as it is.
UNEDITED = "unedited"


@dataclass(frozen=True)
class Comparing:
    """What is compared.

    Attributes:
        methods: names: ``"wise"`` and ``"anyedit"`` into a side memory, those of
            ``editing.methods`` into the weights, ``"unedited"``.
        regime: ``"each"`` or ``"sequence"``.
        settings: by method, settings other than its defaults; under ``"anyedit"``, AnyEdit's own
            are named ``"anyedit.NAME"``.
        chat: put prompts into the tokenizer's chat template.
        batch_size: rows run at once.
        similarity: run the sentence model.
        sub_questions: ask those too.
        unrelated: so many of this project's unrelated prompts say what locality is.
    """

    methods: tuple[str, ...]
    regime: str = "sequence"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chat: bool = False
    batch_size: int = 16
    similarity: bool = True
    sub_questions: bool = True
    unrelated: int = 60

    def __post_init__(self) -> None:
        from ..editing.methods import METHODS

        known = (UNEDITED, *SIDE, *METHODS)
        for name in (*self.methods, *self.settings):
            if name not in known:
                raise ConfigError(f"unknown method {name!r}: choose among {', '.join(known)}")
        if self.regime not in REGIMES:
            raise ConfigError(f"regime is {self.regime!r}: choose one of {REGIMES}")
        for name in self.methods:  # before hours of measuring
            if name in SIDE:
                self.of_side(name)
            elif name != UNEDITED:
                METHODS[name].config_type.from_dict(self.of_weights(name))

    def of_side(self, method: str) -> tuple[WiseConfig, AnyEditConfig]:
        """Settings of a method that edits a side memory.

        Raises:
            ConfigError: an unknown setting, or a bad value.
        """
        rest, own = apart(self.settings.get(method, {}), ANYEDIT, method)
        config = WiseConfig.from_dict({"chat_template": self.chat} | rest)
        return config, AnyEditConfig.from_dict(own)

    def of_weights(self, method: str) -> Row:
        """Settings of a method that edits weights."""
        return {"chat": self.chat, "in_half": True, **self.settings.get(method, {})}


class Contender(Protocol):
    """A method with a model in its hands.

    Attributes:
        one_pass: whether what it did shows where prompt and answer are read in one pass.
    """

    one_pass: bool

    def write(self, edit: Edit) -> Row:
        """Make one edit; returns CPU ``seconds`` by stage and ``iterations``."""
        ...

    def reset(self) -> None:
        """Put the model back as it was."""
        ...


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    what: Comparing,
    known: Iterable[Row] = (),
    progress: bool | ProgressCallback = True,
) -> Iterator[Row]:
    """Measure methods one after another; the model is as it was whenever a row comes.

    Args:
        model: not edited.
        tokenizer: its tokenizer.
        edits: long-form ones; where several have one prompt, the last alone is made.
        what: methods and regime.
        known: rows from before; what they hold is not measured again but yielded as it is.
        progress: a bar on standard error, or a function called with (done, total).

    Yields:
        One row a method, in order: ``method``, ``settings``, ``regime``, ``edits``, ``digest`` (of
        edits and settings), ``cpu_seconds`` an edit and by ``stages``, ``iterations``, and the
        report of ``evaluate_long`` (under ``"each"`` the means of all reports).

    Raises:
        ConfigError, DataError, ModelError: as the methods do.
    """
    replaced = {older for older, _ in find_conflicts(edits)}
    kept = [edit for edit in edits if edit.id not in replaced]
    there = {row["digest"]: row for row in known}
    baseline: LongBaseline | None = None
    for name in what.methods:
        digest = _digest(model, kept, name, what)
        if digest in there:
            yield there[digest]
            continue
        if baseline is None:
            baseline = _baseline(model, tokenizer, kept, what)
        with counted(name, len(kept), progress) as tick:
            row = _measured(model, tokenizer, kept, name, what, baseline, tick)
        about = {"method": name, "settings": dict(what.settings.get(name, {}))}
        yield about | {"regime": what.regime, "edits": len(kept), "digest": digest} | row


def _baseline(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: list[Edit], what: Comparing
) -> LongBaseline:
    from .long_answers import unrelated_prompts

    return baseline_of(
        model,
        tokenizer,
        [],
        chat=what.chat,
        batch_size=what.batch_size,
        similarity=False,
        unrelated=unrelated_prompts()[: what.unrelated],
        progress=False,
    )


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: list[Edit],
    name: str,
    what: Comparing,
    baseline: LongBaseline,
    tick: Any,
) -> Row:
    def asked(some: Sequence[Edit], one_pass: bool) -> Row:
        return evaluate_long(
            model,
            tokenizer,
            some,
            chat=what.chat,
            batch_size=what.batch_size,
            similarity=what.similarity,
            sub_questions=what.sub_questions,
            unedited=False,
            baseline=baseline,
            one_pass=one_pass,
            progress=False,
        )

    written, reports = [], []
    with _contender(model, tokenizer, name, what) as contender:
        for edit in edits:
            written.append(contender.write(edit))
            if what.regime == "each":
                reports.append(asked([edit], contender.one_pass))
                contender.reset()
            tick(1)
        if what.regime == "sequence":
            reports.append(asked(edits, contender.one_pass))
    return _costs(written) | _mean_of(reports)


@contextmanager
def _contender(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, what: Comparing
) -> Iterator[Contender]:
    """A method for a model, which is put back as it was in the end."""
    contender: Contender
    if name == UNEDITED:
        contender = _Nobody()
    elif name in SIDE:
        contender = _SideMemory(model, tokenizer, name, *what.of_side(name))
    else:
        contender = _Weights(model, tokenizer, name, what.of_weights(name))
    try:
        yield contender
    finally:
        contender.reset()


class _Nobody:
    one_pass = True

    def write(self, edit: Edit) -> Row:
        return {"seconds": {}, "iterations": 0}

    def reset(self) -> None:
        pass


class _SideMemory:
    one_pass = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: str,
        config: WiseConfig,
        passages: AnyEditConfig,
    ) -> None:
        from ..editing.editor import Editor

        self._editor = Editor(model, tokenizer, config, anyedit=passages)
        self._method = method

    def write(self, edit: Edit) -> Row:
        report = self._editor.edit([edit], progress=False, method=self._method)
        return {"seconds": {"edit": report.cpu_seconds}, "iterations": report.iterations}

    def reset(self) -> None:
        self._editor.reset()


class _Weights:
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, settings: Row
    ) -> None:
        from ..editing.methods import make_method

        self._method = make_method(name, model, tokenizer, **settings)
        self.one_pass = self._method.one_pass

    def write(self, edit: Edit) -> Row:
        start = time.process_time()
        (outcome,) = self._method.edit([edit])
        spent = time.process_time() - start
        stages = dict(outcome.seconds)
        stages["other"] = max(spent - sum(stages.values()), 0.0)
        return {"seconds": stages, "iterations": outcome.iterations}

    def reset(self) -> None:
        self._method.reset()


def _costs(written: Sequence[Row]) -> Row:
    """CPU seconds and rounds an edit."""
    names = dict.fromkeys(name for row in written for name in row["seconds"])
    stages = {n: sum(row["seconds"].get(n, 0.0) for row in written) / len(written) for n in names}
    return {
        "cpu_seconds": sum(stages.values()),
        "stages": stages,
        "iterations": mean(row["iterations"] for row in written),
    }


def _mean_of(reports: Sequence[Row]) -> Row:
    """The means of reports' figures, level by level; of one report it is that report."""
    merged: Row = {}
    for key, value in reports[0].items():
        others = [report[key] for report in reports]
        if isinstance(value, dict):
            merged[key] = _mean_of(others)
        else:
            merged[key] = sum(others) if key in ("n", "superseded", "seconds") else mean(others)
    return merged


def _digest(model: PreTrainedModel, edits: Sequence[Edit], name: str, what: Comparing) -> str:
    """What tells one measurement from another."""
    from ..models.loading import fingerprint

    about = {
        "model": fingerprint(model),
        "edits": [asdict(edit) for edit in edits],
        "method": name,
        "settings": dict(what.settings.get(name, {})),
        "how": {k: v for k, v in asdict(what).items() if k not in ("methods", "settings")},
    }
    return sha256(canonical(about)).hexdigest()[:16]
