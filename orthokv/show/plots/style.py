"""One look for all figures: the frame, axes, labels at the ends of lines, round numbers on scales."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthokv.planning.profile import ErrorProfile
from orthokv.show.wording import KEY_MODES_IN_WORDS
from orthokv.spec.errors import InvalidSetting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
INK, MUTED, GRID = "#22272e", "#5b6470", "#e4e7eb"
# Okabe and Ito's colours, which stay apart for every kind of colour vision; their yellow is too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#444444", "#8C6D31")
_LINE_HEIGHT = 0.18


def frame(
    width: float, height: float, title: str, subtitle: str, caption: str = "", right: float = 0.0
) -> Figure:
    """An empty figure of `width x height` inches plus the room that its texts take, laid out around them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidSetting("plots need the extra orthokv[plots]") from error
    title, subtitle, caption = (
        textwrap.fill(text, int(width * per_inch))
        for text, per_inch in ((title, 8.8), (subtitle, 15.0), (caption, 16.5))
    )
    lines = [text.count("\n") + 1 if text else 0 for text in (title, subtitle, caption)]
    above = 0.2 + 0.26 * lines[0] + _LINE_HEIGHT * lines[1]
    below = 0.1 + _LINE_HEIGHT * lines[2]
    height += above + below
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    left = 0.12 / width
    for text, y, align, size, colour, weight in (
        (title, 1 - 0.12 / height, "top", 13.0, INK, "bold"),
        (subtitle, 1 - (0.14 + 0.26 * lines[0]) / height, "top", 9.0, MUTED, "normal"),
        (caption, 0.1 / height, "bottom", 8.0, MUTED, "normal"),
    ):
        figure.text(
            left, y, text, va=align, ha="left", size=size, color=colour, weight=weight,
            parse_math=False, linespacing=1.3, in_layout=False,
        )  # fmt: skip
    engine: Any = figure.get_layout_engine()
    box = (0, below / height, 1 - right / width, 1 - (above + below) / height)
    engine.set(rect=box, w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.04)
    return figure


def plain(axes: Axes, grid: str | None = "y") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(labelsize=8.5, colors=MUTED, length=3, width=0.8, which="both")
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]


def save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart within `low..high` and as close as possible to `wanted` (least squares).

    Subtracting `gap` times the place in the order turns the problem into isotonic regression.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    pools: list[list[float]] = []  # sum, count
    for place, i in enumerate(order):
        pools.append([wanted[i] - place * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    flat = [total / count for total, count in pools for _ in range(int(count))]
    highest = max(low, high - gap * (len(wanted) - 1))
    found = [0.0] * len(wanted)
    for place, i in enumerate(order):
        found[i] = min(max(flat[place], low), highest) + place * gap
    return found


def end_labels(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels `(x, y, text, colour)` in the margin right of the axes, moved apart and tied to their points."""
    figure.draw_without_rendering()  # lays the axes out: only then are heights in inches known
    box = axes.get_window_extent()
    heights = [float(axes.transData.transform((x, y))[1] - box.y0) / box.height for x, y, _, _ in ends]
    gap = 0.185 * figure.dpi / box.height
    for (x, y, text, colour), height in zip(ends, spread(heights, gap, 0.0, 1.0), strict=True):
        label = axes.annotate(
            text,
            xy=(x, y),
            xytext=(1.025, height),
            textcoords="axes fraction",
            va="center",
            size=9,
            color=colour,
            annotation_clip=False,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.7,
                "alpha": 0.55,
                "shrinkA": 2,
                "shrinkB": 4,
            },
        )
        label.set_in_layout(False)


def _model_name(profile: ErrorProfile) -> str:
    return textwrap.shorten(
        str(profile.model.get("id", "")).rstrip("/").split("/")[-1], 40, placeholder="..."
    )


def origin(profile: ErrorProfile) -> str:
    parts = (
        _model_name(profile),
        f"{profile.method.get('name', '?')}:{profile.sharing}",
        KEY_MODES_IN_WORDS[profile.key_mode] if profile.geometry.rope is not None else "",
    )
    return ", ".join(part for part in parts if part)


def layer_axis(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    # Few layers leave room at the sides rather than giant bars.
    room = max(0.0, (5 - count) / 2)
    axes.set_xlim(-0.6 - room, count - 0.4 + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, steps=[1, 2, 4, 5, 10]))
    if count <= 17:
        axes.set_xticks(range(count))


def round_levels(low: float, high: float, most: int = 9) -> list[float]:
    """Round numbers within `low..high`: 1-2-5 in every decade, or powers of ten, or finer steps in a narrow range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [
            float(f"{step}e{decade}")
            for decade in decades
            for step in steps
            if low <= float(f"{step}e{decade}") <= high
        ]
        if len(found) <= most:
            break
    return found
