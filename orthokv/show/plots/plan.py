"""Ranks by depth."""

from __future__ import annotations

from pathlib import Path

from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.show.plots.style import INK, PALETTE, end_labels, frame, layer_axis, origin, plain, save
from orthokv.show.wording import number, percent

KEYS, VALUES = PALETTE[0], PALETTE[1]


def plot_plan(plan: Plan, profile: ErrorProfile, path: str | Path) -> Path:
    """Ranks of keys and values by depth as shares of their width, and the error expected of each layer."""
    kl = "" if plan.expected_kl is None else f", expected KL {number(plan.expected_kl, 3)} nats per token"
    figure = frame(
        10.0,
        4.7,
        f"{percent(plan.kept)} of the cache kept{kl}",
        f"{origin(profile)}; {plan.allocation} for {plan.budget}. "
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
    plain(upper)
    upper.set_ylim(0, min(104.0, max(map(max, shares)) * 1.08))
    upper.set_ylabel("rank, % of width", size=9, color=INK)
    lower.bar(range(count), [100 * error for error in plan.expected_error], width=0.76, color="#9aa3ad")
    plain(lower)
    lower.set_ylabel("expected\nlayer error, %", size=9, color=INK)
    lower.set_xlabel("layer", size=9, color=INK)
    layer_axis(lower, count)
    figure.align_ylabels([upper, lower])
    edge = lower.get_xlim()[1]
    end_labels(figure, upper, [(edge, *end[1:]) for end in ends])
    return save(figure, path)
