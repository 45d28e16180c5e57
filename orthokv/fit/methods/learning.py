"""What the learned methods share: which ranks a step trains, and the loop over the layer's own output error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from orthokv.bases.basis import Bases
from orthokv.fit.task import LayerView
from orthokv.models.repeatable import repeatable
from orthokv.spec.errors import InvalidModel

# Ranks that a step may train, as shares of the width. Below the first a cache is useless, above the second the closed
# form is already exact to within rounding.
SMALLEST_SHARE, LARGEST_SHARE = 1 / 16, 15 / 16
_GOLDEN = 0.5 * (math.sqrt(5) - 1)
_PLASTIC = 0.7548776662466927  # with its square, the two-dimensional golden ratio (Roberts 2018)


def rank_pairs(
    width_key: int, width_value: int, seed: int, share: float | None = None
) -> Iterator[tuple[int, int]]:
    """An endless, evenly spread sequence of (rank_key, rank_value), log-uniform in each; with `share`, that of the widths
    alone, again and again.

    Training every prefix of the columns at once is what makes one fit serve all ranks (nested bases). The two ranks follow
    a two-dimensional low-discrepancy sequence, which covers the square far more evenly in few steps than random draws.
    """
    if share is not None:
        yield from repeat((max(1, round(share * width_key)), max(1, round(share * width_value))))
    spread = math.log(LARGEST_SHARE / SMALLEST_SHARE)
    u, v = (seed * _GOLDEN) % 1.0, (seed * _GOLDEN * _GOLDEN) % 1.0
    while True:
        u, v = (u + _PLASTIC) % 1.0, (v + _PLASTIC * _PLASTIC) % 1.0
        shares = (SMALLEST_SHARE * math.exp(spread * x) for x in (u, v))
        rank_key, rank_value = (
            max(1, round(s * w)) for s, w in zip(shares, (width_key, width_value), strict=True)
        )
        yield rank_key, rank_value


def trained_columns(width: int) -> int:
    """How many leading columns of a square basis the steps train."""
    return max(1, round(LARGEST_SHARE * width))


def order_tail(point: Tensor, moment: Tensor) -> Tensor:
    """Put the columns behind the trained ones back in the order of the energy that they carry.

    They still span what the trained columns leave out, but training turned them away from its principal directions.

    Args:
        point: square orthogonal matrices `[groups, width, width]`.
        moment: second moment of what they encode, same shape.
    """
    trained = trained_columns(point.shape[-1])
    head, tail = point[..., :trained].double(), point[..., trained:].double()
    _, vectors = torch.linalg.eigh(tail.transpose(-1, -2) @ moment @ tail)
    return torch.cat([head, (tail @ vectors).flip(-1)], dim=-1).to(point.dtype)


@dataclass
class Adam:
    """Adam's direction for one tensor, without weight decay; the caller applies it (on a manifold, after projecting)."""

    like: Tensor
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        self.mean = torch.zeros_like(self.like)
        self.square = torch.zeros_like(self.like)
        self.count = 0

    def direction(self, gradient: Tensor) -> Tensor:
        self.count += 1
        self.mean.lerp_(gradient, 1 - self.beta1)
        self.square.lerp_(gradient.square(), 1 - self.beta2)
        mean = self.mean / (1 - self.beta1**self.count)
        square = self.square / (1 - self.beta2**self.count)
        return mean / (square.sqrt() + 1e-12)


def descend(
    view: LayerView,
    variables: list[Tensor],
    bases_of: Callable[[int, int], Bases],
    update: Callable[[int, Tensor, float], None],
    *,
    widths: tuple[int, int],
    steps: int,
    seed: int,
    blocks_per_step: int = 1,
    share: float | None = None,
) -> list[float]:
    """Minimise the layer's error over `variables` for `steps` steps; returns the loss of each step.

    The logarithm of the squared relative error is minimised: an error at a high rank is a hundred times smaller than one at
    a low rank and would otherwise not count. `update(i, gradient, factor)` moves variable `i`; `factor` follows a
    cosine from 1 to 0. Two hundred steps of one block do as well as a hundred steps of four, at half the arithmetic (measured,
    `docs/method.md`).

    Raises:
        InvalidModel: the loss is not finite.
    """
    pairs = rank_pairs(*widths, seed, share)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses: list[Tensor] = []
    for step in range(steps):
        if len(order) < blocks_per_step:
            order = torch.randperm(view.fitted_count, generator=generator).tolist()
        blocks, order = order[:blocks_per_step], order[blocks_per_step:]
        for variable in variables:
            variable.requires_grad_(True)
        with torch.enable_grad(), repeatable():
            loss = view.loss(bases_of(*next(pairs)), blocks).clamp_min(1e-20).log()
            gradients = torch.autograd.grad(loss, variables)
        losses.append(loss.detach())  # looked at after the loop: every question stops a GPU's queue
        factor = 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for i, gradient in enumerate(gradients):
                update(i, gradient, factor)
    for variable in variables:
        variable.requires_grad_(False)
    found: list[float] = torch.stack(losses).tolist()
    for step, value in enumerate(found):
        if not math.isfinite(value):
            raise InvalidModel(f"the error of layer {view.index} is not finite at step {step}")
    return found
