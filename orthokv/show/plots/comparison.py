"""Quality against bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from orthokv.show.plots.style import INK, MUTED, PALETTE, end_labels, frame, plain, round_levels, save
from orthokv.show.results import ComparisonRow
from orthokv.show.wording import KEY_MODES_IN_WORDS, percent
from orthokv.spec.errors import InvalidSetting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = {
    "joint": "-",
    "auto": (0, (8, 1.5, 1.5, 1.5)),
    "quad": (0, (7, 2)),
    "pair": (0, (3, 1.5)),
    "tied": (0, (5, 2)),
    "head": (0, (1.5, 1.5)),
}
_MARKERS = {"joint": "o", "auto": "*", "quad": "p", "pair": "P", "tied": "s", "head": "^"}


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Plain numbers for a log axis of ratios, 1 among them."""
    from matplotlib.ticker import MaxNLocator

    if high / low <= 3:
        found = [float(t) for t in MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    else:
        found = [1.0, *round_levels(low, high, most=10)]
    return sorted({tick for tick in found if low <= tick <= high and tick > 0})


def plot_comparison(rows: list[ComparisonRow], path: str | Path) -> Path:
    """Perplexity over that of the uncompressed model against measured cache bytes, one line per method and sharing.

    Colour tells the method, line and marker the sharing, an open marker keys cached after RoPE.

    Raises:
        InvalidSetting: no row has a finite perplexity.
    """
    shown = [row for row in rows if math.isfinite(row.ratio) and row.ratio > 0]
    if not shown:
        raise InvalidSetting("a comparison needs at least one finite perplexity to plot")
    modes = sorted({row.key_mode for row in shown}, reverse=True)
    series: dict[tuple[str, str, str], list[ComparisonRow]] = {}
    for row in shown:
        series.setdefault((row.method, row.sharing, row.key_mode), []).append(row)
    names = {key: f"{key[0]}:{key[1]}" + (f", {key[2]}" if len(modes) > 1 else "") for key in series}
    methods = list(dict.fromkeys(row.method for row in shown))
    asked = min(row.kept_asked for row in shown)
    best = min((row for row in shown if row.kept_asked == asked), key=lambda row: row.ratio)
    best_name = ("Lowest is " if len(series) > 1 else "") + names[best.method, best.sharing, best.key_mode]
    digits = 2 if max(row.ratio for row in shown) > 1.1 else 3
    dropped = len(rows) - len(shown)
    figure = frame(
        10.0,
        max(4.9, 1.2 + 0.21 * (len(series) + 1)),
        f"{best_name}: {best.ratio:.{digits}f} x the dense perplexity at {percent(best.kept)} kept",
        f"Perplexity over that of the uncompressed model against measured cache bytes; "
        f"{' and '.join(KEY_MODES_IN_WORDS.get(mode, mode) for mode in modes)}"
        f"{' (open markers)' if len(modes) > 1 else ''}. Lower is better.",
        f"Not shown: {dropped} measurement{'s' * (dropped > 1)} without a finite perplexity."
        if dropped
        else "",
        right=0.4 + 0.07 * max(len(name) + 6 for name in [*names.values(), "uncompressed"]),
    )
    axes = figure.subplots()
    ends: list[tuple[float, float, str, str]] = []
    for key, points in series.items():
        points = sorted(points, key=lambda row: (-row.kept, row.ratio))
        colour = PALETTE[methods.index(key[0]) % len(PALETTE)]
        x, y = [100 * row.kept for row in points], [row.ratio for row in points]
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=_LINES.get(key[1], "-."),
            marker=_MARKERS.get(key[1], "D"),
            linewidth=1.9,
            markersize=6.5,
            markerfacecolor="white" if key[2] == "post" else colour,
            markeredgecolor=colour if key[2] == "post" else "white",
            markeredgewidth=1.6 if key[2] == "post" else 0.9,
            clip_on=False,
            zorder=3,
        )
        ends.append((x[-1], y[-1], f"{names[key]}  {y[-1]:.{digits}f}", colour))
    _comparison_axes(axes, shown)
    ends.append((axes.get_xlim()[1], 1.0, "uncompressed  1", MUTED))
    end_labels(figure, axes, ends)
    return save(figure, path)


def _comparison_axes(axes: Axes, shown: list[ComparisonRow]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    ratios, kept = [row.ratio for row in shown] + [1.0], [100 * row.kept for row in shown]
    low, high = min(ratios), max(max(ratios), 1.005)
    margin = (high / low) ** 0.06
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(FixedLocator(_ratio_ticks(low / margin, high * margin)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    room = max(2.0, 0.06 * (max(kept) - min(kept)))
    axes.set_xlim(max(kept) + room, max(0.0, min(kept) - room))
    asked = sorted({100 * row.kept_asked for row in shown})
    # The budgets themselves are the best ticks, where they are few, apart, and were spent.
    fit = len(asked) <= 8 and all(min(abs(a - k) for k in kept) < 2 for a in asked)
    apart = all(b - a > (max(kept) - min(kept)) / 16 for a, b in pairwise(asked))
    axes.xaxis.set_major_locator(
        FixedLocator(asked) if fit and apart else MaxNLocator(10, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axhline(1.0, color=MUTED, linewidth=1.1, zorder=1)
    plain(axes, grid="both")
    axes.set_ylabel("perplexity / uncompressed perplexity", size=9.5, color=INK)
    axes.set_xlabel("cache kept, % of 16-bit bytes (smaller to the right)", size=9.5, color=INK)
