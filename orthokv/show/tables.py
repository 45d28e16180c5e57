"""Tables of a profile, a plan and a comparison. Everything is returned, nothing is printed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.planning.surface import interpolate
from orthokv.show.results import ComparisonRow, Summary, summarise
from orthokv.show.wording import KEY_MODES_IN_WORDS, markdown, number, percent


def error_at(layer: LayerProfile, share: float) -> float | None:
    """A layer's error with the same share of the width for keys and values; None below the smallest profiled rank."""
    grid_key, grid_value, squared = interpolate(layer)
    rank_key, rank_value = share * layer.key.width, share * layer.value.width
    if rank_key < grid_key[0] or rank_value < grid_value[0]:
        return None
    along = [float(np.interp(rank_value, grid_value, row)) for row in squared]
    return math.sqrt(float(np.interp(rank_key, grid_key, along)))


def _table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        header_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in text:
        table.add_column(Text(name), no_wrap=True)
    for name in numbers:
        table.add_column(Text(name), justify="right")
    return table


def _rank(total: int, per_head: float, width: int) -> list[str]:
    return [f"{per_head:g}", str(total), percent(total / width)]


def profile_table(profile: ErrorProfile) -> Table:
    """One line a layer: widths, the error where half and a quarter of the cache are kept, and sensitivity.

    Where the sharing was chosen by layer, also the choice and the mean errors at equal bytes that it was made by.
    """
    method = profile.method.get("name", "?")
    title = (
        f"{method}:{profile.sharing}, {KEY_MODES_IN_WORDS[profile.key_mode]}; error of each layer's output"
    )
    head = ("key width", "value width", "error, 50 % kept", "error, 25 % kept", "sensitivity")
    compared = list(dict.fromkeys(c.sharing for layer in profile.layers for c in layer.candidates))
    if compared:
        title += f"; {', '.join(compared)}: mean error at equal bytes"
    chosen = ("sharing", *compared) if profile.sharing == "auto" else ()
    table = _table(title, (), ("layer", *head, *chosen))
    for layer in profile.layers:
        errors = [error_at(layer, share) for share in (0.5, 0.25)]
        table.add_row(
            str(layer.index),
            *(f"{b.groups} x {b.width}" if b.groups > 1 else str(b.width) for b in (layer.key, layer.value)),
            *("-" if error is None else number(error, 3) for error in errors),
            "-" if layer.sensitivity is None else number(layer.sensitivity, 3),
            *((layer.sharing, *(number(c.mean_error, 3) for c in layer.candidates)) if chosen else ()),
        )
    return table


def plan_table(plan: Plan, profile: ErrorProfile) -> Table:
    """One line a layer: ranks per head-equivalent, as layer totals and as shares, and the expected error."""
    heads, width = profile.geometry.kv_heads, profile.geometry.kv_width
    kl = "" if plan.expected_kl is None else f", expected KL {number(plan.expected_kl, 3)} nats per token"
    title = (
        f"{plan.bytes_per_token} of {plan.dense_bytes_per_token} bytes per token, "
        f"{percent(plan.kept)} kept{kl} ({plan.allocation} for {plan.budget})"
    )
    head = [f"{side}{what}" for side in ("keys", "values") for what in ("/head", "/layer", ", share")]
    table = _table(title, (), ("layer", *head, "expected error"))
    sums = [0, 0]
    for layer, ranks, error in zip(profile.layers, plan.ranks, plan.expected_error, strict=True):
        totals = [basis.groups * rank for basis, rank in zip((layer.key, layer.value), ranks, strict=True)]
        sums = [a + b for a, b in zip(sums, totals, strict=True)]
        cells = [cell for total in totals for cell in _rank(total, total / heads, width)]
        table.add_row(str(layer.index), *cells, number(error, 3))
    count = len(profile.layers)
    means = [
        cell
        for total in sums
        for cell in (f"{total / heads / count:.3g}", "", percent(total / width / count))
    ]
    table.add_section()
    table.add_row("mean", *means, "", style="bold")
    return table


_COMPARISON = (
    "asked",
    "kept",
    "bytes/token",
    "perplexity",
    "x dense",
    "KL, nats",
    "layer error",
    "seconds",
)


def _comparison_cells(row: ComparisonRow) -> list[str]:
    return [
        *(percent(row.kept_asked), percent(row.kept), str(row.cache_bytes_per_token)),
        *(number(row.perplexity), number(row.ratio), number(row.kl, 3), number(row.layer_error, 3)),
        "" if row.seconds is None else f"{row.seconds:.1f}",
    ]


def comparison_table(rows: list[ComparisonRow], dense_perplexity: float) -> Table:
    """The uncompressed model, then one line a row; at each budget the lowest perplexity is bold."""
    title = "Perplexity at measured cache sizes, same text and blocks"
    table = _table(title, ("method", "sharing", "keys"), _COMPARISON)
    table.add_row("dense", "", "", "", percent(1.0), "", number(dense_perplexity), "1", "", "", "")
    for row in rows:
        best = row.perplexity <= min(other.perplexity for other in rows if other.kept_asked == row.kept_asked)
        names = [Text(name) for name in (row.method, row.sharing, row.key_mode)]
        table.add_row(*names, *_comparison_cells(row), style="bold" if best else None)
    return table


# ------------------------------------------------------------------------------------- many seeds, one text


def _plain(text: str) -> str:
    return re.sub(r"[|\s]+", " ", text)


def _ratio(found: Summary) -> str:
    ratio = f"{found.row.ratio:.3f}" if math.isfinite(found.row.ratio) else "inf"
    return ratio if found.spread is None else f"{ratio} ± {found.spread:.3f}"


def ratios_markdown(rows: list[ComparisonRow]) -> str:
    """Perplexity over that of the uncompressed model: one line a method, one column a budget; the lowest of each is bold.

    Rows are of one text. With several seeds a cell is their mean and standard deviation.
    """
    found = summarise(rows)
    budgets = sorted({s.row.kept_asked for s in found}, reverse=True)
    best = {b: min(s.row.ratio for s in found if s.row.kept_asked == b) for b in budgets}
    lines: dict[tuple[str, ...], dict[float, str]] = {}
    for summary in found:
        row = summary.row
        names = (_plain(row.method), row.sharing, row.key_mode, row.allocation)
        cell = _ratio(summary)
        lines.setdefault(names, {})[row.kept_asked] = (
            f"**{cell}**" if row.ratio == best[row.kept_asked] else cell
        )
    head = ("method", "sharing", "keys", "ranks", *(f"{100 * b:g} %" for b in budgets))
    cells = ([*names, *(line.get(b, "") for b in budgets)] for names, line in lines.items())
    return markdown(head, cells, left=4) + "\n"


def details_markdown(rows: list[ComparisonRow]) -> str:
    """All figures of rows of one text, means over seeds, one line a method and budget."""
    head = (
        "seeds",
        "asked",
        "kept",
        "bytes/token",
        "perplexity",
        "x dense",
        "KL, nats",
        "layer error",
        "cosine",
        "seconds",
    )
    lines: list[list[str]] = []
    for found in summarise(rows):
        row = found.row
        lines.append(
            [
                *(_plain(row.method), row.sharing, row.key_mode, row.allocation, str(found.seeds)),
                *(percent(row.kept_asked), percent(row.kept), str(row.cache_bytes_per_token)),
                *(number(row.perplexity), _ratio(found), number(row.kl, 3), number(row.layer_error, 3)),
                "" if row.layer_cosine is None else f"{row.layer_cosine:.4f}",
                "" if row.seconds is None else f"{row.seconds:.1f}",
            ]
        )
    return markdown(("method", "sharing", "keys", "ranks", *head), lines, left=4) + "\n"
