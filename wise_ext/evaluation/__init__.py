"""Measuring an edited model: scoring, greedy generation, the metrics and their report."""

from .generation import generate_answers
from .longform import LongBaseline, baseline_of, evaluate_long
from .metrics import contains, normalise, same_text
from .profiling import profile
from .report import evaluate

__all__ = [
    "LongBaseline",
    "baseline_of",
    "contains",
    "evaluate",
    "evaluate_long",
    "generate_answers",
    "normalise",
    "profile",
    "same_text",
]
