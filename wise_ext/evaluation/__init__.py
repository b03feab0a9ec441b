"""Measuring an edited model: scoring, greedy generation, the metrics and their report."""

from .generation import generate_answers
from .metrics import contains, normalise, same_text
from .profiling import profile
from .report import evaluate

__all__ = [
    "contains",
    "evaluate",
    "generate_answers",
    "normalise",
    "profile",
    "same_text",
]
