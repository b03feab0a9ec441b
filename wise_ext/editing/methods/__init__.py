"""Editors that change the model itself, behind one interface: baselines to compare WISE with."""

from __future__ import annotations

from wise_ext.editing.methods.base import Method, MethodConfig, MethodOutcome, Originals
from wise_ext.editing.methods.registry import METHODS, make_method

__all__ = ["METHODS", "Method", "MethodConfig", "MethodOutcome", "Originals", "make_method"]
