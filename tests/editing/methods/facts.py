"""Facts that the taught tiny model has the answers to, which begin differently."""

from __future__ import annotations

from tests.editing.facts import edits_of

FACTS = edits_of("a c d")
