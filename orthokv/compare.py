"""Methods side by side at equal cached bytes: same calibration, same allocator, same evaluation blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from orthokv.allocate import Allocation, allocate
from orthokv.attention import Seam
from orthokv.basis import SHARINGS, Sharing
from orthokv.budget import Budget
from orthokv.dataset import Blocks
from orthokv.errors import InvalidSetting
from orthokv.evaluate import cache_size, layer_errors, quality
from orthokv.methods import METHODS
from orthokv.pipeline import FitSettings, build_profile, fit_layers, planned_bases
from orthokv.progress import Reporter, Step, silent
from orthokv.results import ComparisonRow
from orthokv.source import ModelSource


@dataclass(frozen=True)
class MethodChoice:
    """One line of a comparison, written ``method:sharing`` or ``method:sharing:parameterisation``."""

    method: str
    sharing: str
    parameterisation: str | None = None

    @classmethod
    def parse(cls, text: str) -> MethodChoice:
        """Raises :class:`InvalidSetting` for anything but the two forms above."""
        parts = text.strip().split(":")
        if len(parts) not in (2, 3) or not all(parts) or parts[1] not in SHARINGS:
            raise InvalidSetting(
                f"{text!r} is not method:sharing or method:sharing:parameterisation "
                f"(sharing: {', '.join(SHARINGS)})"
            )
        return cls(parts[0], parts[1], parts[2] if len(parts) == 3 else None)

    def settings(self, base: FitSettings) -> FitSettings:
        """``base`` with this method, which takes from it only the hyper-parameters that it has."""
        fields = METHODS[self.method].__dataclass_fields__ if self.method in METHODS else {}
        return replace(
            base,
            method=self.method,
            sharing=cast(Sharing, self.sharing),
            parameterisation=self.parameterisation,
            steps=base.steps if "steps" in fields else None,
            epochs=base.epochs if "epochs" in fields else None,
        )

    def __str__(self) -> str:
        return self.method if self.parameterisation is None else f"{self.method} ({self.parameterisation})"


def compare_methods(
    model: PreTrainedModel,
    source: ModelSource,
    blocks: Blocks,
    evaluation: Blocks,
    kept: Sequence[float],
    choices: Sequence[MethodChoice],
    settings: FitSettings,
    *,
    allocation: Allocation = "knapsack",
    profiles: Path | None = None,
    report: Reporter = silent,
) -> list[ComparisonRow]:
    """Fit every method once and measure it at every share of bytes, latents stored in 16 bits.

    Args:
        profiles: an existing folder that keeps each method's profile, for other budgets later.
    """
    budgets = [Budget("kept", share) for share in kept]
    every = [choice.settings(settings) for choice in choices]  # all settings are checked before the first fit
    rows: list[ComparisonRow] = []
    for n, (choice, chosen) in enumerate(zip(choices, every, strict=True)):
        name = f"{choice}:{choice.sharing}"
        report(Step("comparing", n, len(choices), "methods"))
        start = time.perf_counter()
        profile = build_profile(
            model,
            source,
            blocks,
            list(fit_layers(model, blocks, chosen, report=_named(report, name))),
            chosen,
        )
        seconds = time.perf_counter() - start
        if profiles is not None:
            folder = profiles / name.replace(":", "-").replace(" ", "")
            folder.mkdir()
            profile.save(folder)
        for budget in budgets:
            plan = allocate(profile, budget, allocation)
            bases = planned_bases(model, profile, plan)
            with Seam(model, profile.key_mode) as seam:
                found = quality(seam, bases, evaluation)
                size = cache_size(seam, bases, evaluation.tokens[0])
                errors, _ = layer_errors(seam, bases, Blocks.of(evaluation.tokens[:4], evaluation.source))
            rows.append(
                ComparisonRow(
                    method=str(choice),
                    sharing=choice.sharing,
                    key_mode=chosen.key_mode,
                    kept_asked=budget.value,
                    kept=size.kept,
                    cache_bytes_per_token=round(size.bytes_per_token),
                    perplexity=found.perplexity,
                    perplexity_dense=found.perplexity_dense,
                    kl=found.kl,
                    layer_error=sum(errors) / len(errors),
                    seconds=seconds,
                )
            )
    report(Step("comparing", len(choices), len(choices), "methods"))
    return rows


def _named(report: Reporter, name: str) -> Reporter:
    return lambda step: report(Step(f"{step.phase} {name}", step.done, step.total, step.unit))
