"""What a compressed cache costs in quality, and what it really holds: everything here is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from orthokv.attention import LayerBases, Seam
from orthokv.capture import LayerTask, LayerWalk
from orthokv.dataset import Blocks
from orthokv.errors import InvalidModel
from orthokv.progress import Reporter, Step, silent
from orthokv.runtime.cache import cache_bytes


@dataclass(frozen=True)
class Quality:
    """Predictions with and without compression, on the same blocks.

    ``kl`` is the mean over tokens of KL(dense || compressed) of the next-token distribution, in nats.
    """

    perplexity: float
    perplexity_dense: float
    kl: float
    tokens: int

    @property
    def increase(self) -> float:
        """Relative increase of perplexity; negative where compression helped by chance or adaptation."""
        return self.perplexity / self.perplexity_dense - 1


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


@torch.no_grad()
def block_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Next-token logits ``[tokens - 1, vocabulary]`` of one block, float32."""
    output = model(tokens.unsqueeze(0).to(model.device), use_cache=False)
    logits: Tensor = output.logits[0, :-1].float()
    return logits


def _nll(logits: Tensor, tokens: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum").double())


def _perplexity(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def divergence(dense: Tensor, other: Tensor) -> float:
    """Sum over tokens of KL(dense || other), nats, from logits ``[tokens, vocabulary]``."""
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).double().sum())


def quality(seam: Seam, bases: Sequence[LayerBases], blocks: Blocks, report: Reporter = silent) -> Quality:
    """Perplexity and KL of ``bases`` on ``blocks``, one block at a time (logits of one block are held).

    Raises:
        InvalidModel: the predictions are not finite.
    """
    nll = nll_dense = kl = 0.0
    count = 0
    none: list[LayerBases | None] = [None] * len(bases)
    for i, tokens in enumerate(blocks.tokens):
        with compressed(seam, none):
            dense = block_logits(seam.model, tokens)
        with compressed(seam, bases):
            other = block_logits(seam.model, tokens)
        nll_dense += _nll(dense, tokens)
        nll += _nll(other, tokens)
        kl += divergence(dense, other)
        count += len(tokens) - 1
        report(Step("evaluating", i + 1, len(blocks), "blocks"))
    found = Quality(_perplexity(nll / count), _perplexity(nll_dense / count), kl / count, count)
    if not all(math.isfinite(x) for x in (found.perplexity, found.perplexity_dense, found.kl)):
        raise InvalidModel(f"the predictions are not finite: {found}")
    return found


def perplexity(model: PreTrainedModel, blocks: Blocks) -> float:
    """Perplexity of a model as it is."""
    total = sum(_nll(block_logits(model, tokens), tokens) for tokens in blocks.tokens)
    return _perplexity(total / (len(blocks) * (blocks.tokens.shape[1] - 1)))


def layer_errors(
    seam: Seam, bases: Sequence[LayerBases], blocks: Blocks, batch_size: int = 4
) -> tuple[list[float], list[float]]:
    """Output error and cosine of every layer on uncompressed inputs, with that layer alone compressed."""
    errors: list[float] = []
    cosines: list[float] = []
    with compressed(seam, [None] * len(bases)):
        walk = LayerWalk(seam.model, blocks.tokens, batch_size)
        for i, layer in enumerate(bases):
            walk.run(i)
            found = LayerTask(i, walk, seam).compare(layer, list(range(len(blocks))))
            errors.append(found.error)
            cosines.append(found.cosine)
            walk.advance()
    return errors, cosines


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
