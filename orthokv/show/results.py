"""What a comparison measured: one row a method, budget and text, and their mean and spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one budget, measured.

    Attributes:
        kept_asked, kept: share of the 16-bit cache's bytes: the budget, and what a live cache holds.
        cache_bytes_per_token: bytes of the live cache, whole model.
        perplexity, perplexity_dense: compressed and uncompressed model on the same blocks.
        kl: mean KL divergence from the uncompressed predictions, nats per token.
        layer_error: relative error of a decoder layer's output, mean over layers.
        seconds: wall time of the fit and of measuring its profile.
        layer_cosine: cosine of a decoder layer's output with the uncompressed one, mean over tokens and layers.
        text: name of the text that was evaluated.
        allocation: the rule that chose the ranks.
        seed: of the fit.
        device: what it ran on.
    """

    method: str
    sharing: str
    key_mode: str
    kept_asked: float
    kept: float
    cache_bytes_per_token: int
    perplexity: float
    perplexity_dense: float
    kl: float
    layer_error: float
    seconds: float | None
    layer_cosine: float | None = None
    text: str = ""
    allocation: str = "knapsack"
    seed: int = 0
    device: str = ""

    @property
    def ratio(self) -> float:
        """Perplexity over that of the uncompressed model."""
        return self.perplexity / self.perplexity_dense

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """Rows that differ in nothing but the seed.

    Attributes:
        row: the mean over seeds of every figure; its `seed` is the first.
        seeds: how many.
        spread: standard deviation over seeds of the perplexity ratio; None with one seed.
    """

    row: ComparisonRow
    seeds: int
    spread: float | None


_FIGURES = ("kept", "perplexity", "perplexity_dense", "kl", "layer_error", "seconds", "layer_cosine")


def summarise(rows: Iterable[ComparisonRow]) -> list[Summary]:
    """One summary a method, sharing, key mode, rule, budget and text, in the order of their first rows."""
    groups: dict[tuple[object, ...], list[ComparisonRow]] = {}
    for row in rows:
        key = (row.method, row.sharing, row.key_mode, row.allocation, row.kept_asked, row.text)
        groups.setdefault(key, []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(group: list[ComparisonRow]) -> Summary:
    means: dict[str, Any] = {}
    for name in _FIGURES:
        values = [getattr(row, name) for row in group]
        means[name] = None if None in values else fmean(values)
    means["cache_bytes_per_token"] = round(fmean(row.cache_bytes_per_token for row in group))
    ratios = [row.ratio for row in group]
    finite = len(ratios) > 1 and all(map(math.isfinite, ratios))
    return Summary(replace(group[0], **means), len(group), stdev(ratios) if finite else None)
