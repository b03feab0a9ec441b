"""The report of an evaluation, from its rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .metrics import mean

# Behind figures that weigh positions or stand for both models, and no part of the details.
_INTERNAL = ("locality_hits", "locality_positions", "locality_same")


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All means of :func:`wise_ext.evaluation.evaluate` over rows of ``measuring.measure``."""

    def average(key: str) -> float | None:
        return mean(row[key] for row in rows)

    def share(key: str, side: bool) -> float | None:
        return mean(None if row[key] is None else (row[key] >= 0) is side for row in rows)

    def perplexity(key: str) -> dict[str, float | None]:
        values = [row[key] for row in rows if row[key] is not None]
        return {"mean": mean(values), "median": statistics.median(values) if values else None}

    hits = [row["locality_hits"] for row in rows if row["locality_hits"] is not None]
    positions = [row["locality_positions"] for row in rows if row["locality_hits"] is not None]
    report: dict[str, Any] = {
        "n": len(rows),
        "reliability": average("reliability"),
        "generalization": average("generalization"),
        "locality": sum(hits) / sum(positions) if positions else None,
        "generation": {
            "reliability": average("answer_is_target"),
            "generalization": average("rephrase_is_target"),
            "contains": average("answer_contains"),
            "locality": average("locality_same"),
        },
        "routing": {
            "edit_to_side": share("route", side=True),
            "rephrase_to_side": share("rephrase_route", side=True),
            "locality_to_main": share("locality_route", side=False),
            "right_shard": average("right_shard"),
            "right_shard_rephrase": average("rephrase_right_shard"),
        },
        "unedited": {
            "reliability": average("unedited_reliability"),
            "generalization": average("unedited_generalization"),
        },
    }
    if any(row["perplexity"] is not None for row in rows):
        report["target_perplexity"] = perplexity("perplexity")
        report["unedited"]["target_perplexity"] = perplexity("unedited_perplexity")
    return report


def details_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the report shows them."""
    return [{key: value for key, value in row.items() if key not in _INTERNAL} for row in rows]
