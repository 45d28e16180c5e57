"""The paper's parameterisation: statistics -> MLP -> QR (StiefAttention v1, section 3 and its recipe in section 4).

What the paper leaves open is ours: the MLP's width, activation and start (no warm one), AdamW's weight decay (its default), the
loss (the logarithm of the squared error, over ranks drawn anew each step, so that truncation serves them all) and the split
for early stopping (an eighth of the blocks). Arithmetic is the model's own where the paper has FP16.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from orthokv.bases.basis import PartialBases, orthonormal
from orthokv.bases.manifold import qr
from orthokv.fit.methods.base import FittedBases
from orthokv.fit.methods.learning import rank_pairs
from orthokv.fit.task import LayerView
from orthokv.models.repeatable import repeatable
from orthokv.spec.errors import InvalidModel
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import Sharing

LEARNING_RATE = 5e-3
PATIENCE = 5
# Blocks per step: 1 for keys, 4 for values (paper section 4).
BLOCKS_KEY, BLOCKS_VALUE = 1, 4
# Not stated in the paper; wide enough that the output matrix, not the MLP, limits the basis.
HIDDEN = 256
HELD_OUT_SHARE = 0.125


class BasisPredictor(nn.Module):
    """`[mean; variance]` of the activations of a group -> a square orthogonal matrix, columns in order of use.

    Three hidden layers (paper section 3); the activation function and the width are ours.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [2 * width, HIDDEN, HIDDEN, HIDDEN, width * width]
        # Without the default initialisation, which would draw from the global generator.
        self.layers = nn.ModuleList(skip_init(nn.Linear, a, b) for a, b in pairwise(sizes))
        self.width = width
        for layer, inputs in zip(self.layers, sizes, strict=False):
            bound = 1 / math.sqrt(inputs)
            for parameter in layer.parameters():
                parameter.data.uniform_(-bound, bound, generator=generator)

    def forward(self, statistics: Tensor) -> Tensor:
        """`[groups, 2 * width]` -> `[groups, width, width]`."""
        x = statistics
        for layer in self.layers[:-1]:
            x = nn.functional.gelu(layer(x))
        return qr(self.layers[-1](x).view(-1, self.width, self.width))


def statistics(view: LayerView, sharing: Sharing, *, keys: bool) -> Tensor:
    """`[mean; variance]` per stored group, `[groups, 2 * width]`, scaled to unit root mean square.

    With one basis for all heads the statistics are pooled over them.
    """
    geometry = view.geometry
    stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=keys)
    mean = view.moments.key_mean if keys else view.moments.value_mean
    square = (view.moments.key if keys else view.moments.value).diagonal()
    mean, square = mean.view(-1, width), square.view(-1, width)
    if mean.shape[0] != stored:
        mean, square = mean.mean(0, keepdim=True), square.mean(0, keepdim=True)
    found = torch.cat([mean, square - mean.square()], dim=-1).float()
    return found / found.square().mean().sqrt()


def fit_predictor(view: LayerView, sharing: Sharing, seed: int, *, epochs: int) -> FittedBases:
    """Keys and values are fitted independently of each other, as in the paper; bases are at full rank."""
    history: dict[str, list[float]] = {}
    found: list[Tensor] = []
    for keys in (True, False):
        losses, point = _fit_side(view, sharing, seed, keys=keys, epochs=epochs)
        history["validation_key" if keys else "validation_value"] = losses
        found.append(point)
    geometry = view.geometry
    key, value = (orthonormal(p, geometry.kv_heads, geometry.head_dim) for p in found)
    return FittedBases(key, value, history)


def _fit_side(
    view: LayerView, sharing: Sharing, seed: int, *, keys: bool, epochs: int
) -> tuple[list[float], Tensor]:
    geometry, device = view.geometry, view.walk.device
    generator = torch.Generator().manual_seed(seed * 2 + keys)
    described = statistics(view, sharing, keys=keys)
    width = described.shape[-1] // 2
    predictor = BasisPredictor(width, generator).to(device)
    optimiser = torch.optim.AdamW(predictor.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs)
    held_out = max(1, round(HELD_OUT_SHARE * view.fitted_count))
    training = list(range(max(1, view.fitted_count - held_out)))
    validation = list(range(view.fitted_count - held_out, view.fitted_count))
    pairs = rank_pairs(width, width, seed)
    blocks_per_step = BLOCKS_KEY if keys else BLOCKS_VALUE

    def loss(rank: int, blocks: list[int]) -> Tensor:
        basis = orthonormal(predictor(described)[..., :rank], geometry.kv_heads, geometry.head_dim)
        bases = PartialBases(basis, None) if keys else PartialBases(None, basis)
        return view.loss(bases, blocks).clamp_min(1e-20).log()

    history: list[float] = []
    best, best_point, waited = math.inf, predictor(described).detach(), 0
    for _ in range(epochs):
        order = torch.randperm(len(training), generator=generator).tolist()
        for start in range(0, len(order), blocks_per_step):
            rank = next(pairs)[0 if keys else 1]
            with torch.enable_grad(), repeatable():
                step_loss = loss(rank, [training[i] for i in order[start : start + blocks_per_step]])
                optimiser.zero_grad()
                step_loss.backward()
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            ranks = [max(1, width // share) for share in (2, 4, 8)]
            value = sum(float(loss(rank, validation)) for rank in ranks) / len(ranks)
            if not math.isfinite(value):
                raise InvalidModel(f"the error of layer {view.index} is not finite in epoch {len(history)}")
            history.append(value)
            if value < best:
                best, best_point, waited = value, predictor(described).detach(), 0
            else:
                waited += 1
        if waited >= PATIENCE:
            break
    return history, best_point
