"""Methods side by side at equal cached bytes: same calibration, same allocator, same evaluation blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from orthokv.fit.methods import METHODS
from orthokv.fit.polish import polish
from orthokv.fit.refine import can_refine
from orthokv.measure.checkpoint import device_name
from orthokv.measure.quality import cache_size, quality_by_layer
from orthokv.models.geometry import geometry_of
from orthokv.models.source import ModelSource
from orthokv.pipeline import build_profile, fit_layers
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import Seam
from orthokv.show.results import ComparisonRow
from orthokv.spec.budget import Budget
from orthokv.spec.check import check
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.progress import Reporter, Step, silent
from orthokv.spec.settings import FitSettings
from orthokv.spec.steps import check_steps
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import SHARING_CHOICES, Allocation, SharingChoice
from orthokv.text.blocks import Blocks


@dataclass(frozen=True)
class MethodChoice:
    """One line of a comparison, written `method:sharing[:parameterisation][:setting=value ...]`."""

    method: str
    sharing: str
    parameterisation: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> MethodChoice:
        """Raises `InvalidSetting` for anything but the form above."""
        method, _, others = text.strip().partition(":")
        sharing, *rest = others.split(":")
        bare = [part for part in rest if "=" not in part]
        options = [part.partition("=") for part in rest if "=" in part]
        if (
            not method
            or sharing not in SHARING_CHOICES
            or len(bare) > 1
            or not all(bare)
            or not all(name and value for name, _, value in options)
        ):
            raise InvalidSetting(
                f"{text!r} is not method:sharing[:parameterisation][:setting=value ...] "
                f"(sharing: {', '.join(SHARING_CHOICES)})"
            )
        return cls(
            method,
            sharing,
            bare[0] if bare else None,
            tuple((name, _value(value)) for name, _, value in options),
        )

    def settings(self, base: FitSettings) -> FitSettings:
        """`base` with this method, which takes from it only the hyper-parameters that it has."""
        fields = METHODS[self.method].__dataclass_fields__ if self.method in METHODS else {}
        check_steps("polish_steps", self.polish_steps)
        options = {name: value for name, value in self.options if name != "polish_steps"}
        return replace(
            base,
            method=self.method,
            sharing=cast(SharingChoice, self.sharing),
            parameterisation=self.parameterisation,
            steps=base.steps if "steps" in fields else None,
            epochs=base.epochs if "epochs" in fields else None,
            refine_steps=options.pop("refine_steps", base.refine_steps),
            options=options,
        )

    @property
    def polish_steps(self) -> int | None:
        """Of what its checkpoints are polished with (`orthokv.fit.polish.polish`)."""
        return dict(self.options).get("polish_steps")

    def __str__(self) -> str:
        said = [] if self.parameterisation is None else [self.parameterisation]
        said += [f"{name}={value}" for name, value in self.options]
        return f"{self.method} ({', '.join(said)})" if said else self.method


def _value(text: str) -> Any:
    """A setting's value: true, false, a number, or the word itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def fit_profile(
    model: PreTrainedModel,
    source: ModelSource,
    blocks: Blocks,
    settings: FitSettings,
    report: Reporter = silent,
) -> tuple[ErrorProfile, float]:
    """The profile of one method, and the seconds that it took."""
    start = time.perf_counter()
    layers = list(fit_layers(model, blocks, settings, report=report))
    profile = build_profile(model, source, blocks, layers, settings, report)
    return profile, time.perf_counter() - start


def polish_profile(
    model: PreTrainedModel,
    profile: ErrorProfile,
    plan: Plan,
    blocks: Blocks,
    choice: MethodChoice,
    report: Reporter = silent,
) -> tuple[ErrorProfile, float]:
    """What a checkpoint of a plan would be written from, and the seconds that it takes more than the profile."""
    start = time.perf_counter()
    polished = polish(model, profile, plan, blocks, choice.polish_steps, report)
    return polished, 0.0 if polished is profile else time.perf_counter() - start


def measure_plan(
    model: PreTrainedModel,
    profile: ErrorProfile,
    plan: Plan,
    evaluation: Blocks,
    choice: MethodChoice,
    *,
    seconds: float | None,
    text: str = "",
) -> ComparisonRow:
    """One plan on one text: the model with and without it, on the same blocks, and a live cache of its ranks."""
    bases = planned_bases(model, profile, plan)
    with Seam(model, profile.key_mode) as seam:
        found, layers = quality_by_layer(seam, bases, evaluation)
        size = cache_size(seam, bases, evaluation.tokens[0])
    return ComparisonRow(
        method=str(choice),
        sharing=choice.sharing,
        key_mode=profile.key_mode,
        kept_asked=plan.budget.value,
        kept=size.kept,
        cache_bytes_per_token=round(size.bytes_per_token),
        perplexity=found.perplexity,
        perplexity_dense=found.perplexity_dense,
        kl=found.kl,
        layer_error=sum(layer.error for layer in layers) / len(layers),
        seconds=seconds,
        layer_cosine=sum(layer.cosine for layer in layers) / len(layers),
        text=text,
        allocation=plan.allocation,
        seed=profile.seed,
        device=device_name(model.device),
    )


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
    """Fit every method once and measure what its checkpoint would be at every share of bytes, latents stored in 16 bits.

    Args:
        profiles: an existing folder that keeps each method's profile, for other budgets later.
    """
    budgets = [Budget("kept", share) for share in kept]
    every = [choice.settings(settings) for choice in choices]  # all settings are checked before the first fit
    geometry = geometry_of(model.config)
    for choice, chosen in zip(choices, every, strict=True):
        for budget in budgets:
            check(geometry, chosen, Target(budget, allocation=allocation, polish_steps=choice.polish_steps))
        can_refine(model, refine_steps=chosen.refine_steps, polish_steps=choice.polish_steps)
    rows: list[ComparisonRow] = []
    for n, (choice, chosen) in enumerate(zip(choices, every, strict=True)):
        name = f"{choice}:{choice.sharing}"
        report(Step("comparing", n, len(choices), "methods"))
        profile, seconds = fit_profile(model, source, blocks, chosen, _named(report, name))
        if profiles is not None:
            folder = profiles / name.replace(":", "-").replace(" ", "")
            folder.mkdir()
            profile.save(folder)
        for budget in budgets:
            plan = allocate(profile, budget, allocation)
            polished, more = polish_profile(model, profile, plan, blocks, choice, _named(report, name))
            rows.append(measure_plan(model, polished, plan, evaluation, choice, seconds=seconds + more))
    report(Step("comparing", len(choices), len(choices), "methods"))
    return rows


def _named(report: Reporter, name: str) -> Reporter:
    return lambda step: report(Step(f"{step.phase} {name}", step.done, step.total, step.unit))
