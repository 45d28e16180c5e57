"""How much arithmetic a job is, counted from the shape of its model and from what was asked for.

The counts need not be exact: `regression.py` learns seconds from them. They have to grow as the work does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from app.jobs.schemas import CompressSpec, JobCreate
from app.jobs.vocabulary import StepName
from orthokv.spec.geometry import Geometry
from orthokv.spec.methods import default_steps
from orthokv.spec.rankgrid import CANDIDATE_SHARES
from orthokv.spec.settings import PROFILE_SAMPLES, FitSettings, held_out
from orthokv.spec.sharing import group_width
from orthokv.spec.steps import polish_steps
from orthokv.spec.vocabulary import SharingChoice

_RANK_PAIRS = len(CANDIDATE_SHARES) ** 2
_PLANS_TRIED = 9  # by a budget on perplexity
_BACKWARD = 3  # a forward and a backward pass cost three forward passes


@dataclass(frozen=True)
class Shape:
    """What costs depend on of a decoder. `parameters` counts every stored number."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    vocabulary: int = 0

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @classmethod
    def of(cls, geometry: Geometry, parameters: int, vocabulary: int) -> Self:
        return cls(
            layers=geometry.layers,
            hidden=geometry.hidden_size,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            parameters=parameters,
            vocabulary=vocabulary,
        )

    @classmethod
    def of_resolved(cls, resolved: dict[str, Any]) -> Self | None:
        """Of what a worker found out (`job.resolved`); None for an older or simpler one."""
        geometry, model = resolved.get("geometry", {}), resolved.get("model", {})
        try:
            return cls(
                layers=geometry["layers"],
                hidden=geometry["hidden_size"],
                heads=geometry["heads"],
                kv_heads=geometry["kv_heads"],
                head_dim=geometry["head_dim"],
                parameters=model["parameters"],
            )
        except KeyError:
            return None


@dataclass(frozen=True)
class Asked:
    """What costs depend on of a request."""

    samples: int
    length: int
    method: str
    sharing: SharingChoice
    steps: int
    refine_steps: int
    polish_steps: int
    writes_itself: bool
    searches: bool

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @classmethod
    def of(cls, spec: CompressSpec | JobCreate) -> Self:
        """Of what a job of kind `compress` is asked for."""
        method, dataset, target, settings = spec.method, spec.dataset, spec.target(), settings_of(spec)
        predictor = method.parameterisation == "predictor"
        return cls(
            samples=dataset.num_samples,
            length=dataset.sequence_length,
            method=f"{method.type}:{method.parameterisation}" if predictor else method.type,
            sharing=method.sharing,
            steps=default_steps(method.type) if method.steps is None else method.steps,
            refine_steps=settings.refinement_steps,
            polish_steps=polish_steps(settings.refinement_steps, target.budget, target.polish_steps),
            writes_itself=any(text.source == "self" for text in dataset.texts),
            searches=target.budget.metric == "perplexity_increase",
        )


def settings_of(spec: CompressSpec | JobCreate) -> FitSettings:
    """What the fit would be told."""
    dataset = spec.dataset
    return spec.method.settings(
        num_samples=max(2, dataset.num_samples), sequence_length=dataset.sequence_length, seed=spec.seed
    )


def basis_width(shape: Shape, sharing: SharingChoice) -> int:
    """Numbers of a key or value that one basis covers; of the widest form where each layer chooses.

    Raises:
        InvalidSetting: the KV heads do not divide into such groups.
    """
    form = "joint" if sharing == "auto" else sharing
    _, width = group_width(form, shape.kv_heads, shape.head_dim, keys=False)
    return width


def flop(shape: Shape, asked: Asked, step: StepName, *, layers: int | None = None) -> float:
    """Floating-point operations of a step; of a fit, over this many layers (default: all)."""
    count = shape.layers if layers is None else layers
    width = basis_width(shape, asked.sharing)
    held = held_out(asked.samples) * asked.length
    forward = 2.0 * shape.parameters
    # One token through one layer's attention, with its keys and values taken to a basis and back.
    queries = shape.heads * shape.head_dim
    attention = 4.0 * queries * asked.length + 2.0 * queries * shape.hidden + 8.0 * shape.kv_width * width
    # A step of the last stage of a fit, or of a plan's polish: one block through the whole model and back.
    refinement = _BACKWARD * asked.length * (forward + shape.layers * attention)
    match step:
        case StepName.RESOLVE:
            return forward  # a digest of every weight
        case StepName.CALIBRATE:
            return forward * asked.tokens if asked.writes_itself else 0.0
        case StepName.FIT:
            capture = asked.tokens * (forward / shape.layers + 4.0 * shape.kv_width * width)
            decompose = 20.0 * shape.kv_width / width * width**3
            profile = _RANK_PAIRS * PROFILE_SAMPLES * asked.length * attention
            learn = _BACKWARD * asked.steps * asked.length * attention
            tried = 3 if asked.sharing == "auto" else 1
            return count * (capture + tried * (decompose + profile + learn))
        case StepName.PROFILE:
            sensitivities = PROFILE_SAMPLES * asked.length * forward * shape.layers
            return sensitivities + asked.refine_steps * refinement
        case StepName.PACKAGE:
            search = _PLANS_TRIED * held * forward if asked.searches else 0.0
            return search + asked.polish_steps * refinement
        case StepName.EVALUATE:
            return 4.0 * held * (forward + shape.layers * attention)
