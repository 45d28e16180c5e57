"""The last stage of a fit: all bases of the model together, by the divergence of the model's own predictions.

Layer errors are the objective of every method before: they are local, so layers can be fitted apart, but they know neither
what later layers make of an error nor that errors of several layers add up. Here the whole compressed model runs, and its
bases move to bring `KL(uncompressed || compressed)` of the next-token distribution down, at plans of many budgets in
turn, so that the bases stay nested: one refined profile still serves every budget. At a single plan they move a little
further: what that plan's own checkpoint is polished by (`docs/decisions/0015-polish.md`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from orthokv.bases.basis import Bases, Basis, orthonormal
from orthokv.bases.manifold import cholesky_qr, duals, tangent
from orthokv.fit.divergence import PART_TOKENS, kl_sum, model_logits
from orthokv.fit.methods.learning import Adam
from orthokv.models.geometry import decoder_layers
from orthokv.models.repeatable import repeatable
from orthokv.models.states import layers_replaced, pass_on
from orthokv.models.streaming import streamed_weights
from orthokv.planning.allocate import allocate
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.planning.search import smallest_kept
from orthokv.runtime.seam import Seam, compressed
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidDataset, InvalidModel, InvalidSetting
from orthokv.spec.progress import Reporter, Step, silent
from orthokv.text.blocks import Block, Blocks, evenly, starts_over
from orthokv.text.written import self_text

# Budgets whose plans are trained: this many, evenly on a logarithmic scale up to this share of the cache.
TRAINED_PLANS, LARGEST_KEPT = 16, 0.8
_GOLDEN = 0.5 * (math.sqrt(5) - 1)
# Progress is judged at the start and this many times after, on this many blocks of each text, at these shares of the cache.
CHECKS, CHECK_BLOCKS, CHECK_KEPT = 8, 2, (0.5, 0.25, 0.125)
SECOND_DOMAIN_LENGTH = 256


@dataclass(frozen=True)
class Refinement:
    """Settings of the stage.

    Attributes:
        steps: optimiser steps, each on one calibration block at one plan.
        step_size: how far a column turns in a step at the start, in radians, about.
        patience: checks without progress, one after the other, that end the stage.
    """

    steps: int = 400
    step_size: float = 0.01
    patience: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidSetting(f"refine_steps must be at least 1, not {self.steps}")
        if not self.step_size > 0:
            raise InvalidSetting(f"step_size must be above 0, not {self.step_size}")


@dataclass
class _Side:
    """Keys or values of one layer: the fitted basis `E, D` turned by `A`: encoder `E A`, decoder `D A^-T`.

    `A` starts as the identity and keeps every prefix of the columns a projector; it is orthogonal where the basis is.
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

    def turned(self, turn: Tensor, dual: Tensor, rank: int) -> Basis:
        """The basis turned by `turn`, whose inverse is `dual^T`."""
        basis = self.basis
        encoder = basis.encoder @ turn[..., :rank]
        if basis.orthonormal:
            return orthonormal(encoder, basis.kv_heads, basis.head_dim)
        return Basis(encoder, basis.decoder @ dual[..., :rank], basis.kv_heads, basis.head_dim)

    def move(self, gradient: Tensor, step_size: float) -> None:
        step = step_size / self.turn.shape[-1] ** 0.5
        if self.basis.orthonormal:
            direction = self.adam.direction(tangent(self.turn, gradient))
            self.turn.copy_(cholesky_qr(self.turn - step * tangent(self.turn, direction)))
        else:
            self.turn.sub_(step * self.adam.direction(gradient))


Ranks = Sequence[tuple[int, int]]


def can_refine(model: PreTrainedModel, **asked: int | None) -> bool:
    """Whether the model is whole; gradients through all layers need it.

    Args:
        asked: settings that ask for steps, by name; None or 0 do not.

    Raises:
        InvalidSetting: it is streamed from disk, and a setting asks for steps.
    """
    if streamed_weights(model) is None:
        return True
    for name, steps in asked.items():
        if steps:
            raise InvalidSetting(f"{name} {steps} needs the whole model, which is streamed from disk")
    return False


def watched_texts(model: PreTrainedModel, blocks: Blocks, seed: int) -> list[Blocks]:
    """Text that the model writes itself, placed like `blocks`, to watch a refinement on besides held-out ones; none from a
    model without a BOS token to begin with.
    """
    length = min(int(blocks.tokens.shape[1]), SECOND_DOMAIN_LENGTH)
    try:
        text = self_text(model, num_samples=CHECK_BLOCKS, sequence_length=length, seed=seed + 1)
    except InvalidDataset:
        return []
    if not any(blocks.starts):
        return [text]
    return [text.placed(starts_over(blocks.positions, length, CHECK_BLOCKS))]


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

    def turned(self, turns: Sequence[Tensor], ranks: Ranks) -> list[tuple[Basis, Basis]]:
        """Every layer's bases of the given ranks, turned by `turns` (in the order of `turns`)."""
        flat = [side for pair in self.sides for side in pair]
        # The inverse of an orthogonal matrix is its transpose.
        inverses = turns if all(side.basis.orthonormal for side in flat) else duals(turns)
        wanted = [rank for pair in ranks for rank in pair]
        found = [
            side.turned(turn, dual, rank)
            for side, turn, dual, rank in zip(flat, turns, inverses, wanted, strict=True)
        ]
        return list(zip(found[::2], found[1::2], strict=True))

    def divergence(self, dense: Tensor, block: Block, ranks: Ranks) -> Tensor:
        """Mean KL a token of one block, in nats, at the given ranks; differentiable in the turns."""
        dtype = self.seam.model.dtype
        bases = [
            Bases(key.to(dtype=dtype), value.to(dtype=dtype)) for key, value in self.turned(self.turns, ranks)
        ]
        with compressed(self.seam, bases):
            student = model_logits(self.seam.model, *block)
        # A part's distributions are computed again for its gradient: of a large vocabulary they would be the
        # largest tensors of the stage.
        parts = zip(dense.split(PART_TOKENS), student.split(PART_TOKENS), strict=True)
        sums = [checkpoint(kl_sum, p, q, use_reentrant=False) for p, q in parts]
        return torch.stack(sums).sum() / len(dense)


class _Teacher:
    """The uncompressed model. Of a block that it has seen it keeps what the last decoder layer made of it, so that each
    block runs through the layers once; logits of a large vocabulary would be too much to keep.
    """

    def __init__(self, seam: Seam) -> None:
        self.seam = seam
        self.layers = decoder_layers(seam.model)
        self._last: dict[int, Any] = {}

    @torch.no_grad()
    def logits(self, block: Block, number: int | None = None) -> Tensor:
        """Logits `[T - 1, vocabulary]`; under `number` the block is remembered."""
        if number is None:
            return self._run(block)
        if number not in self._last:
            keep = self.layers[-1].register_forward_hook(
                lambda module, args, output: self._last.__setitem__(number, output)
            )
            try:
                return self._run(block)
            finally:
                keep.remove()
        output = self._last[number]
        others = [pass_on(tuples=isinstance(output, tuple))] * (len(self.layers) - 1)
        with layers_replaced(self.layers, [*others, lambda *args, **kwargs: output]):
            return model_logits(self.seam.model, *block)

    def _run(self, block: Block) -> Tensor:
        with compressed(self.seam, [None] * len(self.layers)):
            return model_logits(self.seam.model, *block)


def refine(
    model: PreTrainedModel,
    profile: ErrorProfile,
    calibration: Blocks,
    checks: Sequence[Blocks],
    settings: Refinement,
    seed: int,
    report: Reporter = silent,
    *,
    plan: Plan | None = None,
) -> tuple[ErrorProfile, list[float]]:
    """Refine all bases of a profile, and the score at every check.

    Plans of many budgets are trained in turn, so that the bases stay nested; or `plan` alone, at whose ranks they end up
    better, and at others worse.

    The score is the mean logarithm of the divergence over `checks`: texts that are not trained on, one of them from
    another domain, so that what is kept did not merely adapt to the calibration text. The bases with the best score are
    returned, those of the start included. The errors in the result are still those of the old bases: measure them anew.

    Raises:
        InvalidModel: the divergence is not finite.
    """
    plans, judged = _nested_ranks(profile) if plan is None else ([plan.ranks], [plan.ranks])
    watched = [text[i] for text in checks for i in evenly(len(text), CHECK_BLOCKS)]
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    scores: list[float] = []
    with Seam(model, profile.key_mode) as seam:
        student, teacher = _Student.of(seam, profile), _Teacher(seam)
        turns = student.turns
        best = [turn.clone() for turn in turns]
        for step in range(settings.steps + 1):
            # The first step at or after each CHECKS-th of the way: there `step * CHECKS / steps` has passed a whole number.
            if step * CHECKS % settings.steps < CHECKS or step == settings.steps:
                scores.append(_score(teacher, student, watched, judged))
                if not math.isfinite(scores[-1]):
                    raise InvalidModel(
                        f"the divergence of the predictions is not finite at refinement step {step}"
                    )
                if scores[-1] <= min(scores):
                    best = [turn.clone() for turn in turns]
                elif min(scores[-settings.patience :]) > min(scores):
                    break
            report(Step("refining", step, settings.steps, "steps"))
            if step == settings.steps:
                break
            order = order or torch.randperm(len(calibration), generator=generator).tolist()
            # Multiples of the golden ratio fall evenly into [0, 1) however many there are: no budget is long without a turn.
            ranks = plans[int((step + 1) * _GOLDEN % 1.0 * len(plans))]
            number = order.pop()
            block = calibration[number]
            _step(student, teacher.logits(block, number), block, ranks, settings, step)
        full = [(layer.key.rank, layer.value.rank) for layer in profile.layers]
        layers = [
            replace(layer, key=key.to("cpu").contiguous(), value=value.to("cpu").contiguous())
            for layer, (key, value) in zip(profile.layers, student.turned(best, full), strict=True)
        ]
    return replace(profile, layers=tuple(layers)), scores


def _nested_ranks(profile: ErrorProfile) -> tuple[list[Ranks], list[Ranks]]:
    """Ranks of the plans that are trained, and of those that are judged."""
    low = smallest_kept(profile)
    trained = [low * (LARGEST_KEPT / low) ** (i / (TRAINED_PLANS - 1)) for i in range(TRAINED_PLANS)]
    judged = [max(share, low) for share in CHECK_KEPT]

    def ranks(shares: list[float]) -> list[Ranks]:
        return [allocate(profile, Budget("kept", share)).ranks for share in shares]

    return ranks(trained), ranks(judged)


def _step(
    student: _Student, dense: Tensor, block: Block, ranks: Ranks, settings: Refinement, step: int
) -> None:
    """One step. A divergence that is not finite makes the turns so too, which the next check sees."""
    turns = student.turns
    for turn in turns:
        turn.requires_grad_(True)
    try:
        with torch.enable_grad(), repeatable():
            # The logarithm: a divergence at small ranks is a hundred times that at large ones, which would not count.
            loss = student.divergence(dense, block, ranks).clamp_min(1e-20).log()
            gradients = torch.autograd.grad(loss, turns)
    finally:
        for turn in turns:
            turn.requires_grad_(False)
    size = settings.step_size * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    with torch.no_grad():
        sides = [side for pair in student.sides for side in pair]
        for side, gradient in zip(sides, gradients, strict=True):
            side.move(gradient, size)


@torch.no_grad()
def _score(teacher: _Teacher, student: _Student, watched: Sequence[Block], plans: Sequence[Ranks]) -> float:
    found: list[float] = []
    for block in watched:
        dense = teacher.logits(block)
        found += [float(student.divergence(dense, block, ranks)) for ranks in plans]
    return sum(math.log(max(x, 1e-20)) for x in found) / len(found)
