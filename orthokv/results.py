"""What a comparison measured: one row a method, budget and text, and their mean and spread over seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one budget, measured.

    Attributes:
        kept_asked, kept: share of the 16-bit cache's bytes: the budget, and what a live cache holds.
        cache_bytes_per_token: bytes of the live cache, whole model.
        perplexity, perplexity_dense: compressed and uncompressed model on the same blocks.
        kl: mean KL divergence from the uncompressed predictions, nats per token.
        layer_error: relative error of a decoder layer's output.
        seconds: wall time of the fit.
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

    @property
    def ratio(self) -> float:
        """Perplexity over that of the uncompressed model."""
        return self.perplexity / self.perplexity_dense

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
