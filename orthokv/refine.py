"""The last stage of a fit: all bases of the model together, by the divergence of the model's own predictions.

Layer errors are the objective of every method before: they are local, so layers can be fitted apart, but they know neither
what later layers make of an error nor that errors of several layers add up. Here the whole compressed model runs, and its
bases move to bring ``KL(uncompressed || compressed)`` of the next-token distribution down, at plans of many budgets in
turn, so that the bases stay nested: one refined profile still serves every budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthokv.allocate import allocate, smallest_kept
from orthokv.attention import Bases, Seam
from orthokv.basis import Basis, cholesky_qr, orthonormal, tangent
from orthokv.budget import Budget
from orthokv.dataset import Blocks, evenly
from orthokv.errors import InvalidModel, InvalidSetting
from orthokv.evaluate import compressed
from orthokv.methods.learning import Adam
from orthokv.profile import ErrorProfile
from orthokv.progress import Reporter, Step, silent

# Budgets whose plans are trained: this many, evenly on a logarithmic scale up to this share of the cache.
TRAINED_PLANS, LARGEST_KEPT = 16, 0.8
_GOLDEN = 0.5 * (math.sqrt(5) - 1)
# Progress is judged this many times, on this many blocks of each text, at these shares of the cache.
CHECKS, CHECK_BLOCKS, CHECK_KEPT = 8, 2, (0.5, 0.25, 0.125)
PATIENCE = 3


@dataclass(frozen=True)
class Refinement:
    """Settings of the stage.

    Attributes:
        steps: optimiser steps, each on one calibration block at one plan.
        step_size: how far a column turns in a step at the start, in radians, about.
    """

    steps: int = 200
    step_size: float = 0.007

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidSetting(f"refine_steps must be at least 1, not {self.steps}")
        if not self.step_size > 0:
            raise InvalidSetting(f"step_size must be above 0, not {self.step_size}")


@dataclass
class _Side:
    """Keys or values of one layer: the fitted basis ``E, D`` turned by ``A``: encoder ``E A``, decoder ``D A^-T``.

    ``A`` starts as the identity and keeps every prefix of the columns a projector; it is orthogonal where the basis is.
    """

    basis: Basis
    turn: Tensor  # [stored groups, width, width]
    adam: Adam = field(init=False)

    def __post_init__(self) -> None:
        self.adam = Adam(self.turn)

    @classmethod
    def of(cls, basis: Basis, device: torch.device) -> _Side:
        eye = torch.eye(basis.rank, device=device).expand(len(basis.encoder), -1, -1).contiguous()
        return cls(basis.to(device), eye)

    def turned(self, rank: int, turn: Tensor | None = None) -> Basis:
        turn = self.turn if turn is None else turn
        basis = self.basis
        encoder = basis.encoder @ turn[..., :rank]
        if basis.orthonormal:
            return orthonormal(encoder, basis.kv_heads, basis.head_dim)
        dual = torch.linalg.inv(turn).transpose(-1, -2)
        return Basis(encoder, basis.decoder @ dual[..., :rank], basis.kv_heads, basis.head_dim)

    def move(self, gradient: Tensor, step_size: float) -> None:
        step = step_size / self.turn.shape[-1] ** 0.5
        if self.basis.orthonormal:
            direction = self.adam.direction(tangent(self.turn, gradient))
            self.turn.copy_(cholesky_qr(self.turn - step * tangent(self.turn, direction)))
        else:
            self.turn.sub_(step * self.adam.direction(gradient))


Ranks = Sequence[tuple[int, int]]


@dataclass
class _Student:
    """The model with bases that can move."""

    seam: Seam
    sides: list[tuple[_Side, _Side]]

    @classmethod
    def of(cls, seam: Seam, profile: ErrorProfile) -> _Student:
        device = seam.model.device
        return cls(seam, [(_Side.of(p.key, device), _Side.of(p.value, device)) for p in profile.layers])

    @property
    def turns(self) -> list[Tensor]:
        return [side.turn for pair in self.sides for side in pair]

    @torch.no_grad()
    def teacher(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the uncompressed model on one block ``[T]``: ``[T - 1, vocabulary]``."""
        with compressed(self.seam, [None] * len(self.sides)):
            return self._log_probabilities(tokens)

    def divergence(self, teacher: Tensor, tokens: Tensor, ranks: Ranks) -> Tensor:
        """Mean KL a token of one block ``[T]``, in nats, at the given ranks; differentiable in the turns."""
        dtype = self.seam.model.dtype
        bases = [
            Bases(key.turned(r).to(dtype=dtype), value.turned(s).to(dtype=dtype))
            for (key, value), (r, s) in zip(self.sides, ranks, strict=True)
        ]
        with compressed(self.seam, bases):
            student = self._log_probabilities(tokens)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        model: Any = self.seam.model
        output = model(tokens.unsqueeze(0).to(model.device), use_cache=False)
        found: Tensor = output.logits[0, :-1].float().log_softmax(-1)
        return found


def refine(
    model: PreTrainedModel,
    profile: ErrorProfile,
    calibration: Blocks,
    checks: Sequence[Blocks],
    settings: Refinement,
    seed: int,
    report: Reporter = silent,
) -> tuple[ErrorProfile, list[float]]:
    """Refine all bases of a profile, and the score at every check.

    The score is the mean logarithm of the divergence over ``checks``: texts that are not trained on, one of them from
    another domain, so that what is kept did not merely adapt to the calibration text. The bases with the best score are
    returned, those of the start included. The errors in the result are still those of the old bases: measure them anew.

    Raises:
        InvalidModel: the divergence is not finite.
    """
    low = smallest_kept(profile)
    shares = [low * (LARGEST_KEPT / low) ** (i / (TRAINED_PLANS - 1)) for i in range(TRAINED_PLANS)]
    plans = [allocate(profile, Budget("kept", share)).ranks for share in shares]
    judged = [allocate(profile, Budget("kept", max(share, low))).ranks for share in CHECK_KEPT]
    watched = [text.tokens[i] for text in checks for i in evenly(len(text), CHECK_BLOCKS)]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    scores: list[float] = []
    with Seam(model, profile.key_mode) as seam:
        student = _Student.of(seam, profile)
        turns = student.turns
        best = [turn.clone() for turn in turns]
        for step in range(settings.steps + 1):
            if step * CHECKS % settings.steps < CHECKS or step == settings.steps:
                scores.append(_score(student, watched, judged))
                if scores[-1] <= min(scores):
                    best = [turn.clone() for turn in turns]
                elif min(scores[-PATIENCE:]) > min(scores):
                    break
            report(Step("refining", step, settings.steps, "steps"))
            if step == settings.steps:
                break
            order = order or torch.randperm(len(calibration), generator=generator).tolist()
            ranks = plans[int((step + 1) * _GOLDEN % 1.0 * TRAINED_PLANS)]
            _step(student, calibration.tokens[order.pop()], ranks, settings, step)
        layers = []
        for layer, pair, kept in zip(
            profile.layers, student.sides, zip(best[::2], best[1::2], strict=True), strict=True
        ):
            key, value = (side.turned(side.basis.rank, turn) for side, turn in zip(pair, kept, strict=True))
            layers.append(replace(layer, key=key.to("cpu").contiguous(), value=value.to("cpu").contiguous()))
    return replace(profile, layers=tuple(layers)), scores


def _step(student: _Student, tokens: Tensor, ranks: Ranks, settings: Refinement, step: int) -> None:
    turns = student.turns
    for turn in turns:
        turn.requires_grad_(True)
    try:
        with torch.enable_grad():
            # The logarithm: a divergence at small ranks is a hundred times that at large ones, which would not count.
            loss = student.divergence(student.teacher(tokens), tokens, ranks).clamp_min(1e-20).log()
            gradients = torch.autograd.grad(loss, turns)
    finally:
        for turn in turns:
            turn.requires_grad_(False)
    if not math.isfinite(float(loss.detach())):
        raise InvalidModel(f"the divergence of the predictions is not finite at refinement step {step}")
    size = settings.step_size * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    with torch.no_grad():
        sides = [side for pair in student.sides for side in pair]
        for side, gradient in zip(sides, gradients, strict=True):
            side.move(gradient, size)


@torch.no_grad()
def _score(student: _Student, watched: Sequence[Tensor], plans: Sequence[Ranks]) -> float:
    found: list[float] = []
    for tokens in watched:
        teacher = student.teacher(tokens)
        found += [float(student.divergence(teacher, tokens, ranks)) for ranks in plans]
    return sum(math.log(max(x, 1e-20)) for x in found) / len(found)
