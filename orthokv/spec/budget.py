"""What a user may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from orthokv.spec.errors import InvalidSetting

Metric = Literal["kept", "layer_error", "perplexity_increase"]
METRICS: tuple[Metric, ...] = ("kept", "layer_error", "perplexity_increase")


@dataclass(frozen=True)
class Budget:
    """One number to stay below.

    Attributes:
        metric: `kept`: stored bytes over the bytes of the 16-bit cache, in (0, 1]. `layer_error`: relative error of every
            decoder layer's output. `perplexity_increase`: perplexity over the uncompressed model's minus 1, on a held-out
            slice of the calibration data.
        value: the bound, in the unit of its metric.
    """

    metric: Metric
    value: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InvalidSetting(f"budget metric must be one of {', '.join(METRICS)}, not {self.metric!r}")
        if self.metric == "kept" and not 0 < self.value <= 1:
            raise InvalidSetting(f"kept must be above 0 and at most 1, not {self.value:g}")
        if not 0 < self.value < float("inf"):
            raise InvalidSetting(f"{self.metric} must be a positive number, not {self.value:g}")

    @classmethod
    def from_options(cls, **options: float | None) -> Budget:
        """Exactly one of `kept`, `layer_error` and `perplexity_increase`."""
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) != 1:
            names = ", ".join("--" + name.replace("_", "-") for name in METRICS)
            raise InvalidSetting(f"give exactly one budget of {names}")
        ((name, value),) = given.items()
        return cls(cast(Metric, name), value)

    def __str__(self) -> str:
        return f"{self.metric} <= {self.value:g}"
