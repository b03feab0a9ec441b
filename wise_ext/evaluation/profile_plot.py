"""A profile as a picture: blocks along the axis, routing and side memory where they run."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .profiling import EMBEDDING, OUTPUT, ROUTING, SIDE, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Hues that hold apart without colour vision, too.
_COLOURS = {"the model": "#B8B8B8", ROUTING: "#0072B2", SIDE: "#D55E00"}


def require_matplotlib() -> None:
    """Raises:
    ConfigError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "a picture needs matplotlib: pip install 'wise-ext[plot]', or leave --png out"
        ) from None


def draw(profile: Profile, title: str) -> bytes:
    """The picture, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((9.0, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _phase(upper, profile, [part.prefill for part in profile.parts])
    _phase(lower, profile, [part.decode for part in profile.parts])
    upper.set_title(
        f"prefill of {profile.tokens} tokens: {profile.prefill:.1f} ms, "
        f"{profile.prefill_ratio:.3f} times the unedited model's",
        fontsize=10,
    )
    lower.set_title(
        f"a decoded token: {profile.decode:.1f} ms, {profile.decode_ratio:.3f} times", fontsize=10
    )
    upper.legend(fontsize=8)
    lower.set_xlabel("block")
    figure.suptitle(title, fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _phase(axes: Axes, profile: Profile, times: list[float]) -> None:
    blocks = [part.block for part in profile.parts if part.block is not None]
    last = max(blocks, default=-1)
    heights = {name: [0.0] * (last + 3) for name in _COLOURS}
    for part, spent in zip(profile.parts, times, strict=True):
        kind = part.name if part.name in heights else "the model"
        if part.name == EMBEDDING:
            heights[kind][0] += spent
        elif part.block is not None:
            heights[kind][part.block + 1] += spent
        elif part.name == OUTPUT:
            heights[kind][last + 2] += spent
    floor = [0.0] * (last + 3)
    for name, values in heights.items():
        axes.bar(range(last + 3), values, bottom=floor, color=_COLOURS[name], label=name)
        floor = [a + b for a, b in zip(floor, values, strict=True)]
    step = max(1, (last + 1) // 15)
    ticks = list(range(0, last + 1, step))
    axes.set_xticks(
        [0, *(n + 1 for n in ticks), last + 2],
        ["in", *map(str, ticks), "out"],
        fontsize=7,
    )
    axes.set_ylabel("ms")
    axes.grid(axis="y", alpha=0.3)
