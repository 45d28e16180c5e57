"""What a compressed cache costs in quality, and what it really holds: everything here is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from orthokv.attention import LayerBases, Seam
from orthokv.capture import Comparison, LayerTask, LayerWalk, empty_states, positions_from
from orthokv.dataset import Blocks
from orthokv.errors import InvalidModel
from orthokv.progress import Reporter, Step, silent
from orthokv.runtime.cache import cache_bytes

# Tokens whose next-token distributions are compared at a time.
PART_TOKENS = 512


@dataclass(frozen=True)
class Quality:
    """Predictions with and without compression, on the same blocks.

    ``kl`` is the mean over tokens of KL(dense || compressed) of the next-token distribution, in nats; ``changes`` the change
    of the mean negative log-likelihood of each block, in nats a token.
    """

    perplexity: float
    perplexity_dense: float
    kl: float
    tokens: int
    changes: tuple[float, ...] = ()

    @property
    def increase(self) -> float:
        """Relative increase of perplexity; negative where compression helped by chance or adaptation."""
        return self.perplexity / self.perplexity_dense - 1

    @property
    def increase_bound(self) -> float:
        """What the increase stays below on other text of the same kind, with 95 % confidence: a one-sided bound from the
        spread of the blocks (Student's t). Of a single block, which has no spread, the increase itself.
        """
        if len(self.changes) < 2:
            return self.increase
        error = statistics.stdev(self.changes) / len(self.changes) ** 0.5
        return math.expm1(min(statistics.fmean(self.changes) + _t95(len(self.changes) - 1) * error, 700))


def _t95(freedom: int) -> float:
    """The 95 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5; within 2 % from 3 degrees of freedom)."""
    z = statistics.NormalDist().inv_cdf(0.95)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class CacheSize:
    """Bytes a token of a live cache, and of the uncompressed 16-bit cache of the same model."""

    bytes_per_token: float
    bytes_per_token_dense: float

    @property
    def kept(self) -> float:
        return self.bytes_per_token / self.bytes_per_token_dense


@contextmanager
def compressed(seam: Seam, bases: Sequence[LayerBases | None]) -> Iterator[None]:
    """All layers of a model use ``bases`` inside the block, and what they had before after it."""
    before = [seam.state(i).bases for i in range(len(bases))]
    try:
        for i, layer in enumerate(bases):
            seam.set_bases(i, layer)
        yield
    finally:
        for i, layer in enumerate(before):
            seam.set_bases(i, layer)


def model_logits(model: PreTrainedModel, tokens: Tensor, start: int = 0) -> Tensor:
    """Next-token logits ``[tokens - 1, vocabulary]`` of one block that begins at position ``start``, as the model is now;
    differentiable, in its own dtype.
    """
    ids = tokens.unsqueeze(0).to(model.device)
    output = model(ids, use_cache=False, **positions_from(start, ids, model.device))
    logits: Tensor = output.logits[0, :-1]
    return logits


@torch.no_grad()
def block_logits(model: PreTrainedModel, tokens: Tensor, start: int = 0) -> Tensor:
    """:func:`model_logits` in float32, without gradients."""
    return model_logits(model, tokens, start).float()


def _nll(logits: Tensor, tokens: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum").double())


def _perplexity(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def kl_sum(dense: Tensor, other: Tensor) -> Tensor:
    """Sum over tokens of KL(dense || other), nats, from logits ``[tokens, vocabulary]``; differentiable, float64."""
    p, q = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).double().sum()


def divergence(dense: Tensor, other: Tensor) -> float:
    """:func:`kl_sum` in parts: four more tables of the logits' size would be the largest tensors of a run."""
    parts = zip(dense.split(PART_TOKENS), other.split(PART_TOKENS), strict=True)
    return float(torch.stack([kl_sum(p, q) for p, q in parts]).sum())


def quality(
    seam: Seam, bases: Sequence[LayerBases], blocks: Blocks, report: Reporter = silent, batch_size: int = 4
) -> Quality:
    """Perplexity and KL of ``bases`` on ``blocks`` (logits of one block at a time are held).

    Raises:
        InvalidModel: the predictions are not finite.
    """
    return quality_by_layer(seam, bases, blocks, report, batch_size, compared=0)[0]


def quality_by_layer(
    seam: Seam,
    bases: Sequence[LayerBases],
    blocks: Blocks,
    report: Reporter = silent,
    batch_size: int = 4,
    compared: int = 4,
) -> tuple[Quality, list[Comparison]]:
    """:func:`quality`, and every layer's output error and cosine on uncompressed inputs with that layer alone compressed.

    Uncompressed and compressed hidden states go through the layers side by side, so that a model streamed from disk is read
    once. The layers are compared on the first ``compared`` blocks.

    Raises:
        InvalidModel: the predictions are not finite.
    """
    comparisons: list[Comparison] = []
    with compressed(seam, [None] * len(bases)):
        walk = LayerWalk(seam.model, blocks.tokens, batch_size, blocks.starts)
        states = empty_states(walk.inputs.shape, walk.inputs.dtype, walk.device)
        states.copy_(walk.inputs)
        for i, layer in enumerate(bases):
            walk.run(i)
            if compared:
                task = LayerTask(i, walk, seam, len(walk.inputs))
                comparisons.append(task.compare(layer, list(range(min(compared, len(blocks))))))
            seam.set_bases(i, layer)
            walk.through(i, states, states, range(len(blocks)))
            seam.set_bases(i, None)
            walk.advance()
            report(Step("evaluating", i + 1, len(bases), "layers"))
        found = _compare_predictions(walk, walk.inputs, states)
    return found, comparisons


def _compare_predictions(walk: LayerWalk, dense_states: Tensor, states: Tensor) -> Quality:
    """The quality of two sets of last hidden states ``[n, T, hidden]``."""
    nll = nll_dense = kl = 0.0
    changes: list[float] = []
    for i, tokens in enumerate(walk.tokens):
        block = slice(i, i + 1)
        dense = walk.logits(dense_states[block], block)[0, :-1].float()
        other = walk.logits(states[block], block)[0, :-1].float()
        one, one_dense = _nll(other, tokens), _nll(dense, tokens)
        nll += one
        nll_dense += one_dense
        changes.append((one - one_dense) / (len(tokens) - 1))
        kl += divergence(dense, other)
    count = walk.tokens.shape[0] * (walk.tokens.shape[1] - 1)
    found = Quality(
        _perplexity(nll / count), _perplexity(nll_dense / count), kl / count, count, tuple(changes)
    )
    if not all(math.isfinite(x) for x in (found.perplexity, found.perplexity_dense, found.kl)):
        raise InvalidModel(f"the predictions are not finite: {found}")
    return found


def separate_divergences(
    seam: Seam,
    bases: Sequence[LayerBases],
    blocks: Blocks,
    report: Reporter = silent,
    batch_size: int = 4,
) -> list[float]:
    """KL(dense || compressed) in nats, mean over tokens, of each layer compressed alone, at every layer.

    In one pass over the layers: the hidden states of a model with one compressed layer leave the uncompressed ones there.
    ``layers + 1`` sets of hidden states are held at its end.
    """
    n = len(blocks)
    with compressed(seam, [None] * len(bases)):
        walk = LayerWalk(seam.model, blocks.tokens, batch_size, blocks.starts)
        shape = (len(bases) * n, *walk.inputs.shape[1:])
        states = empty_states(shape, walk.inputs.dtype, walk.device)
        for i, layer in enumerate(bases):
            walk.through(i, states[: i * n], states[: i * n], list(range(n)) * i)
            seam.set_bases(i, layer)
            walk.through(i, walk.inputs, states[i * n : (i + 1) * n], range(n))
            seam.set_bases(i, None)
            walk.run(i)
            walk.advance()
            report(Step("sensitivity", i + 1, len(bases), "layers"))
        total = [0.0] * len(bases)
        for j in range(n):
            block = slice(j, j + 1)
            dense = walk.logits(walk.inputs[block], block)[0, :-1].float()
            for i in range(len(bases)):
                at = i * n + j
                total[i] += divergence(dense, walk.logits(states[at : at + 1], block)[0, :-1].float())
    tokens = n * (blocks.tokens.shape[1] - 1)
    return [kl / tokens for kl in total]


def perplexity(model: PreTrainedModel, blocks: Blocks) -> float:
    """Perplexity of a model as it is."""
    total = sum(_nll(block_logits(model, *block), block.tokens) for block in blocks)
    return _perplexity(total / (len(blocks) * (blocks.tokens.shape[1] - 1)))


@torch.no_grad()
def cache_size(seam: Seam, bases: Sequence[LayerBases], tokens: Tensor) -> CacheSize:
    """Prefill ``tokens`` ``[T]`` with and without compression and weigh both caches.

    A model loaded in 32 bits has an uncompressed cache of 32 bits a number: it is counted at 16, so that ``kept`` means the
    same everywhere.
    """
    ids = tokens.unsqueeze(0).to(seam.model.device)
    sizes: list[float] = []
    for layers in (list(bases), None):
        cache = DynamicCache(config=seam.model.config)
        if layers is None:
            with _stock(seam):
                seam.model(ids, past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes(cache) / len(tokens) * 2 / seam.model.dtype.itemsize)
        else:
            with compressed(seam, layers):
                seam.model(ids, past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes(cache) / len(tokens))
    return CacheSize(*sizes)


@contextmanager
def _stock(seam: Seam) -> Iterator[None]:
    """The model without the seam, for what needs its own cache."""
    states = [seam.state(i) for i in range(len(seam.modules))]
    seam.remove()
    try:
        yield
    finally:
        seam.install(states)


def tokens_per_second(
    seam: Seam, bases: Sequence[LayerBases], prompt: Tensor, new_tokens: int = 64
) -> tuple[float, float]:
    """Greedy decoding speed ``(compressed, dense)`` of one sequence after ``prompt`` ``[T]``, tokens a second."""
    speeds: list[float] = []
    for dense in (False, True):
        with _stock(seam) if dense else compressed(seam, bases):
            _decode(seam.model, prompt, 2)  # first calls allocate and tune
            start = time.perf_counter()
            _decode(seam.model, prompt, new_tokens)
            speeds.append(new_tokens / (time.perf_counter() - start))
    return speeds[0], speeds[1]


@torch.no_grad()
def _decode(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> None:
    ids = prompt.unsqueeze(0).to(model.device)
    generate: Any = model.generate
    generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
