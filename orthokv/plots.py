"""Pictures of a profile, a plan and a comparison, as PNG files.

matplotlib is an optional extra and imported at the first plot. Figures are built without pyplot and carry no date, so
that the same input gives the same bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orthokv.allocate import Plan
from orthokv.errors import InvalidSetting
from orthokv.profile import ErrorProfile, LayerProfile
from orthokv.rankgrid import interpolate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from orthokv.report import ComparisonRow

Floats = NDArray[np.float64]

DPI = 160
MAX_PANELS = 12
INK, MUTED, GRID = "#22272e", "#5b6470", "#e4e7eb"
# Okabe and Ito's colours, which stay apart for every kind of colour vision; their yellow is too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9", "#444444", "#8C6D31")
KEYS, VALUES = PALETTE[0], PALETTE[1]
# From light (small error) to dark: one direction of lightness, readable in grey.
_SURFACE = ("#fdf8e4", "#d3e6c5", "#8fc9b9", "#4a9fb0", "#2f6f9f", "#2b4482", "#241f4d")
_LINES = {"joint": "-", "tied": (0, (5, 2)), "head": (0, (1.5, 1.5))}
_MARKERS = {"joint": "o", "tied": "s", "head": "^"}
KEY_MODES_IN_WORDS = {"pre": "keys before RoPE", "post": "keys after RoPE"}
# Labels of contours stand where they cross one of these ways (value share, key share, from and to), clear of the lines
# of equal cache size: whichever is crossed by more of them.
_ALONG_VALUES, _ALONG_KEYS = (0.2, 0.9, 0.92, 0.9), (0.88, 0.2, 0.88, 0.95)
# Caches of these sizes are drawn across every error surface.
_KEPT_LINES = (0.25, 0.5)
_LINE_HEIGHT = 0.18


def number(value: float, digits: int = 4) -> str:
    """A figure with at least ``digits`` significant digits, plain where that is readable: 31.83, 12345, 1.200e-06."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 10**digits <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(share: float) -> str:
    """A share of bytes or of a width, in per cent with one decimal."""
    return f"{100 * share:.1f} %"


# ------------------------------------------------------------------------------------------------ one style


def _frame(
    width: float, height: float, title: str, subtitle: str, caption: str = "", right: float = 0.0
) -> Figure:
    """An empty figure of ``width x height`` inches plus the room that its texts take, laid out around them."""
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


def _plain(axes: Axes, grid: str | None = "y") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(labelsize=8.5, colors=MUTED, length=3, width=0.8, which="both")
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart within ``low..high`` and as close as possible to ``wanted`` (least squares).

    Subtracting ``gap`` times the place in the order turns the problem into isotonic regression.
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


def _end_labels(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels ``(x, y, text, colour)`` in the margin right of the axes, moved apart and tied to their points."""
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


def _origin(profile: ErrorProfile) -> str:
    parts = (
        _model_name(profile),
        f"{profile.method.get('name', '?')}:{profile.sharing}",
        KEY_MODES_IN_WORDS[profile.key_mode] if profile.geometry.rope is not None else "",
    )
    return ", ".join(part for part in parts if part)


def _layer_axis(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    # Few layers leave room at the sides rather than giant bars.
    room = max(0.0, (5 - count) / 2)
    axes.set_xlim(-0.6 - room, count - 0.4 + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, steps=[1, 2, 4, 5, 10]))
    if count <= 17:
        axes.set_xticks(range(count))


# ------------------------------------------------------------------------------------------------- profile


def round_levels(low: float, high: float, most: int = 9) -> list[float]:
    """Round numbers within ``low..high``: 1-2-5 in every decade, or powers of ten, or finer steps in a narrow range."""
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


def _surface(layer: LayerProfile) -> tuple[Floats, Floats, Floats]:
    """Shares of value and key width, and the error in per cent ``[key, value]``, as the allocator interpolates it."""
    grid_key, grid_value, squared = interpolate(layer)
    if min(squared.shape) < 2:
        raise InvalidSetting(f"layer {layer.index} was profiled at one rank: there is no surface to draw")
    return grid_value / layer.value.width, grid_key / layer.key.width, 100 * np.sqrt(squared)


def _shape(panels: int, *, depth: bool) -> tuple[int, int, bool]:
    """Rows and columns, and whether the sensitivities need a row of their own below the panels."""
    columns = panels if panels <= 4 else 3 if panels <= 6 else 4
    rows = -(-panels // columns)
    return rows, columns, depth and rows * columns == panels


def plot_profile(profile: ErrorProfile, path: str | Path) -> Path:
    """The error-rank surface of every layer (of at most 12, evenly chosen), and sensitivity by depth.

    Colours and contour lines show the relative error of the layer's output on a log scale that all panels share. Along a
    dashed line the cache has one size; the dot on it is the best split between keys and values.
    """
    count = len(profile.layers)
    chosen = [
        profile.layers[i]
        for i in sorted({round(i * (count - 1) / (MAX_PANELS - 1)) for i in range(MAX_PANELS)})
    ]
    if count <= MAX_PANELS:
        chosen = list(profile.layers)
    surfaces = [_surface(layer) for layer in chosen]
    depth = count > 1 and all(layer.sensitivity is not None for layer in profile.layers)
    rows, columns, own_row = _shape(len(chosen), depth=depth)
    width = {1: 6.6, 2: 8.6}.get(columns, 10.0)
    height = rows * {1: 5.0, 2: 3.6, 3: 2.85, 4: 2.25}[columns] + (1.75 if own_row else 0)
    kept = " and ".join(f"{100 * share:g} %" for share in _KEPT_LINES)
    caption = (
        f"Dashed: equal cache size, {kept} kept; dot: its best split between keys and values. "
        f"Measured at {len(chosen[0].ranks_key)} x {len(chosen[0].ranks_value)} ranks, interpolated between them."
    )
    if depth:
        caption += " Sensitivity: KL divergence of the model's predictions per squared error of the layer."
    if len(chosen) < count:
        caption = f"{len(chosen)} of {count} layers, evenly chosen. {caption}"
    figure = _frame(
        width,
        height,
        "Error of each layer's output by key and value rank",
        f"{_origin(profile)}. Relative error of the decoder layer's output on calibration text.",
        caption,
    )
    ratios = [1.0] * rows + ([0.62] if own_row else [])
    grid = figure.add_gridspec(rows + own_row, columns, height_ratios=ratios)
    panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(chosen))]
    _draw_surfaces(figure, panels, chosen, surfaces, columns)
    if depth:
        used = len(chosen) % columns
        place = grid[rows, :] if own_row else grid[rows - 1, used:]
        _draw_sensitivity(figure.add_subplot(place), profile)
    return _save(figure, path)


def _draw_surfaces(
    figure: Figure,
    panels: list[Axes],
    layers: list[LayerProfile],
    surfaces: list[tuple[Floats, Floats, Floats]],
    columns: int,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    # Towards an exact cache the error falls to zero, which would stretch a log scale without end: the scale ends at a
    # third of the smallest error that is measured with both sides compressed.
    high = max(float(error.max()) for _, _, error in surfaces) or 1.0
    inner = min(100 * float(layer.error[:-1, :-1].min()) for layer in layers)
    low = min(max(inner / 3, high / 1000), high / 1.5)
    colours = LinearSegmentedColormap.from_list("error", list(_SURFACE))
    norm = LogNorm(low, high)
    levels = round_levels(low, high)
    mesh: Any = None
    for place, (axes, layer, (x, y, error)) in enumerate(zip(panels, layers, surfaces, strict=True)):
        clipped = np.clip(error, low, high)
        mesh = axes.pcolormesh(x, y, clipped, norm=norm, cmap=colours, shading="gouraud", rasterized=True)
        _draw_splits(axes, x, y, error)
        if inside := [level for level in levels if error.min() < level < error.max()]:
            _draw_contours(axes, x, y, error, inside, norm)
        axes.set_xlim(float(x[0]), 1)
        axes.set_ylim(float(y[0]), 1)
        axes.set_title(f"layer {layer.index}", size=9.5, color=INK, loc="left", pad=4)
        axes.tick_params(labelsize=8, colors=MUTED, length=2.5, width=0.7)
        for spine in axes.spines.values():
            spine.set_color(MUTED)
            spine.set_linewidth(0.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator([0.25, 0.5, 0.75, 1.0]))
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}"))
        below = place + columns < len(panels)
        axes.tick_params(labelbottom=not below, labelleft=place % columns == 0)
        if place // columns == (len(panels) - 1) // columns:
            axes.set_xlabel("value rank, % of width", size=8.5, color=INK)
        if place % columns == 0:
            axes.set_ylabel("key rank, % of width", size=8.5, color=INK)
    bar = figure.colorbar(
        mesh, ax=panels, location="right", aspect=28, pad=0.015, fraction=0.05, extend="min"
    )
    bar.set_label("error, % (log scale)", size=8.5, color=INK)
    bar.ax.yaxis.set_major_locator(FixedLocator(levels))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=2.5)
    bar.outline.set_visible(False)


def _draw_contours(axes: Axes, x: Floats, y: Floats, error: Floats, levels: list[float], norm: Any) -> None:
    ink = [INK if norm(level) < 0.6 else "white" for level in levels]
    lines = axes.contour(x, y, error, levels=levels, colors=ink, linewidths=0.8)
    spots = max((_label_spots(x, y, error, levels, way) for way in (_ALONG_VALUES, _ALONG_KEYS)), key=len)
    if spots:
        texts = axes.clabel(
            lines,
            levels=list(spots),
            manual=list(spots.values()),
            fmt="%g %%",
            fontsize=7.5,
            inline_spacing=1,
        )
        for text in texts:
            text.set_rotation(0)


def _at(x: Floats, y: Floats, error: Floats, across: Floats, up: Floats) -> Floats:
    """The error at points of a surface, bilinear."""
    rows = np.stack([np.interp(across, x, row) for row in error])
    return np.array([np.interp(up[i], y, rows[:, i]) for i in range(len(across))])


def _label_spots(
    x: Floats, y: Floats, error: Floats, levels: list[float], way: tuple[float, float, float, float]
) -> dict[float, tuple[float, float]]:
    """Where contours cross a straight way through the panel, as level -> point; crowded ones are left out."""
    steps = np.linspace(0.0, 1.0, 400)
    across, up = way[0] + steps * (way[2] - way[0]), way[1] + steps * (way[3] - way[1])
    path = _at(x, y, error, across, up)
    found: dict[float, tuple[float, float]] = {}
    last = 2.0
    for level in levels:
        crossed = np.flatnonzero(path >= level)
        if (
            len(crossed)
            and crossed[-1] < len(steps) - 1
            and last - (step := float(steps[crossed[-1]])) > 0.17
        ):
            found[level] = (float(across[crossed[-1]]), float(up[crossed[-1]]))
            last = step
    return found


def _draw_splits(axes: Axes, x: Floats, y: Floats, error: Floats) -> None:
    """Lines of equal cache size, and on each the split between keys and values with the least error."""
    for kept in _KEPT_LINES:
        across = np.linspace(max(float(x[0]), 2 * kept - 1), min(1.0, 2 * kept - float(y[0])), 257)
        up = 2 * kept - across
        best = int(_at(x, y, error, across, up).argmin())
        axes.plot(across, up, color="white", linewidth=0.9, alpha=0.8, dashes=(4, 4))
        axes.plot(
            across[best], up[best], "o", markersize=4.5, color="white", markeredgecolor=INK, clip_on=False
        )


def _draw_sensitivity(axes: Axes, profile: ErrorProfile) -> None:
    values = [float(layer.sensitivity or 0.0) for layer in profile.layers]
    axes.bar(range(len(values)), values, width=0.7, color="#2f6f9f")
    _plain(axes)
    _layer_axis(axes, len(values))
    axes.set_title("sensitivity, nats", size=9.5, color=INK, loc="left", pad=4)
    axes.set_xlabel("layer", size=8.5, color=INK)


# ---------------------------------------------------------------------------------------------------- plan


def plot_plan(plan: Plan, profile: ErrorProfile, path: str | Path) -> Path:
    """Ranks of keys and values by depth as shares of their width, and the error expected of each layer."""
    kl = "" if plan.expected_kl is None else f", expected KL {number(plan.expected_kl, 3)} nats per token"
    figure = _frame(
        10.0,
        4.7,
        f"{percent(plan.kept)} of the cache kept{kl}",
        f"{_origin(profile)}; {plan.allocation} for {plan.budget}. "
        f"{plan.bytes_per_token} of {plan.dense_bytes_per_token} bytes per token.",
        right=1.45,
    )
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.0, 1.0])
    count = len(plan.ranks)
    shares = [
        [100 * ranks[side] / basis.width for ranks, basis in zip(plan.ranks, bases, strict=True)]
        for side, bases in enumerate(
            ([layer.key for layer in profile.layers], [layer.value for layer in profile.layers])
        )
    ]
    ends: list[tuple[float, float, str, str]] = []
    for name, side, offset, colour in (("keys", shares[0], -0.2, KEYS), ("values", shares[1], 0.2, VALUES)):
        upper.bar([i + offset for i in range(count)], side, width=0.36, color=colour)
        mean = sum(side) / count
        upper.axhline(mean, color=colour, linewidth=1.1, dashes=(5, 3))
        ends.append((1.0, mean, f"{name}{', mean' if count > 1 else ''} {mean:.1f} %", colour))
    _plain(upper)
    upper.set_ylim(0, min(104.0, max(map(max, shares)) * 1.08))
    upper.set_ylabel("rank, % of width", size=9, color=INK)
    lower.bar(range(count), [100 * error for error in plan.expected_error], width=0.76, color="#9aa3ad")
    _plain(lower)
    lower.set_ylabel("expected\nlayer error, %", size=9, color=INK)
    lower.set_xlabel("layer", size=9, color=INK)
    _layer_axis(lower, count)
    figure.align_ylabels([upper, lower])
    edge = lower.get_xlim()[1]
    _end_labels(figure, upper, [(edge, *end[1:]) for end in ends])
    return _save(figure, path)


# ---------------------------------------------------------------------------------------------- comparison


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
    figure = _frame(
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
    _end_labels(figure, axes, ends)
    return _save(figure, path)


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
    _plain(axes, grid="both")
    axes.set_ylabel("perplexity / uncompressed perplexity", size=9.5, color=INK)
    axes.set_xlabel("cache kept, % of 16-bit bytes (smaller to the right)", size=9.5, color=INK)
