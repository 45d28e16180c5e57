"""What a compressed cache costs in quality, and what it really holds: everything here is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from orthokv.bases.basis import LayerBases
from orthokv.fit.divergence import divergence
from orthokv.fit.task import Comparison, LayerTask
from orthokv.fit.walk import LayerWalk
from orthokv.models.states import empty_states
from orthokv.runtime.cache import cache_bytes
from orthokv.runtime.seam import Seam, compressed, without_seam
from orthokv.spec.errors import InvalidModel
from orthokv.spec.progress import Reporter, Step, silent
from orthokv.text.blocks import Blocks


@dataclass(frozen=True)
class Quality:
    """Predictions with and without compression, on the same blocks.

    `kl` is the mean over tokens of KL(dense || compressed) of the next-token distribution, in nats; `changes` the change
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


def _nll(logits: Tensor, tokens: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum").double())


def _perplexity(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def quality(
    seam: Seam, bases: Sequence[LayerBases], blocks: Blocks, report: Reporter = silent, batch_size: int = 4
) -> Quality:
    """Perplexity and KL of `bases` on `blocks` (logits of one block at a time are held).

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
    """`quality`, and every layer's output error and cosine on uncompressed inputs with that layer alone compressed.

    Uncompressed and compressed hidden states go through the layers side by side, so that a model streamed from disk is read
    once. The layers are compared on the first `compared` blocks.

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
    """The quality of two sets of last hidden states `[n, T, hidden]`."""
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


@torch.no_grad()
def cache_size(seam: Seam, bases: Sequence[LayerBases], tokens: Tensor) -> CacheSize:
    """Prefill `tokens` `[T]` with and without compression and weigh both caches.

    A model loaded in 32 bits has an uncompressed cache of 32 bits a number: it is counted at 16, so that `kept` means the
    same everywhere.
    """
    ids = tokens.unsqueeze(0).to(seam.model.device)
    sizes: list[float] = []
    for layers in (list(bases), None):
        cache = DynamicCache(config=seam.model.config)
        if layers is None:
            with without_seam(seam):
                seam.model(ids, past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes(cache) / len(tokens) * 2 / seam.model.dtype.itemsize)
        else:
            with compressed(seam, layers):
                seam.model(ids, past_key_values=cache, use_cache=True)
            sizes.append(cache_bytes(cache) / len(tokens))
    return CacheSize(*sizes)


def tokens_per_second(
    seam: Seam, bases: Sequence[LayerBases], prompt: Tensor, new_tokens: int = 64
) -> tuple[float, float]:
    """Greedy decoding speed `(compressed, dense)` of one sequence after `prompt` `[T]`, tokens a second."""
    speeds: list[float] = []
    for dense in (False, True):
        with without_seam(seam) if dense else compressed(seam, bases):
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
