"""The error-rank surface of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orthokv.planning.knapsack import Floats
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.planning.surface import interpolate
from orthokv.show.plots.style import INK, MUTED, frame, layer_axis, origin, plain, round_levels, save
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.stored import PICTURE_PANELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From light (small error) to dark: one direction of lightness, readable in grey.
_SURFACE = ("#fdf8e4", "#d3e6c5", "#8fc9b9", "#4a9fb0", "#2f6f9f", "#2b4482", "#241f4d")
# Labels of contours stand where they cross one of these ways (value share, key share, from and to), clear of the lines
# of equal cache size: whichever is crossed by more of them.
_ALONG_VALUES, _ALONG_KEYS = (0.2, 0.9, 0.92, 0.9), (0.88, 0.2, 0.88, 0.95)
# Caches of these sizes are drawn across every error surface.
_KEPT_LINES = (0.25, 0.5)


def _surface(layer: LayerProfile) -> tuple[Floats, Floats, Floats]:
    """Shares of value and key width, and the error in per cent `[key, value]`, as the allocator interpolates it."""
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
        for i in sorted({round(i * (count - 1) / (PICTURE_PANELS - 1)) for i in range(PICTURE_PANELS)})
    ]
    if count <= PICTURE_PANELS:
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
    figure = frame(
        width,
        height,
        "Error of each layer's output by key and value rank",
        f"{origin(profile)}. Relative error of the decoder layer's output on calibration text.",
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
    return save(figure, path)


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
    plain(axes)
    layer_axis(axes, len(values))
    axes.set_title("sensitivity, nats", size=9.5, color=INK, loc="left", pad=4)
    axes.set_xlabel("layer", size=8.5, color=INK)
