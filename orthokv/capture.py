"""One streaming pass over the calibration blocks, layer by layer, with bounded memory.

At any time the inputs and the outputs of a single decoder layer are held. Every layer sees *uncompressed* inputs, so layers
are independent and can be fitted on different machines.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthokv.architectures import architecture_of
from orthokv.attention import Bases, LayerBases, Seam
from orthokv.errors import InvalidModel, StorageError
from orthokv.geometry import AttentionGeometry, check_positions, decoder_layers


@dataclass(frozen=True)
class LayerMoments:
    """Second moments of one layer over the calibration tokens, float64, on the model's device.

    Attributes:
        tokens: calibration tokens seen.
        key: ``[kv_width, kv_width]``, all KV heads concatenated; before or after RoPE as the seam's key mode says.
        value: ``[kv_width, kv_width]``.
        query: ``[kv_heads, head_dim, head_dim]``, summed over the query heads that read a KV head.
        key_mean, value_mean: ``[kv_width]``.
    """

    tokens: int
    key: Tensor
    value: Tensor
    query: Tensor
    key_mean: Tensor
    value_mean: Tensor


class _Stop(Exception):
    """Ends a forward once what was to be seen of it is known."""


def _sharing(arguments: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with the tensors of ``known`` where they are equal: a mask, the largest, is so at every start."""

    def shared(value: Any, other: Any) -> Any:
        same = isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape
        return other if same and torch.equal(value, other) else value

    return {name: shared(value, known.get(name)) for name, value in arguments.items()}


_spill_folder: ContextVar[Path | None] = ContextVar("spill_folder", default=None)


@contextmanager
def spilled_to(folder: Path | None) -> Iterator[None]:
    """Hidden states of walks that begin inside the block are kept in files in ``folder`` (which exists), not in memory.

    The files have no name and vanish with the walk. None keeps them in memory, on the model's device.
    """
    token = _spill_folder.set(folder)
    try:
        yield
    finally:
        _spill_folder.reset(token)


def empty_states(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for hidden states, on ``device`` or where :func:`spilled_to` says (then a tensor of the CPU's).

    Raises:
        StorageError: the folder cannot be written, or is too small.
    """
    folder = _spill_folder.get()
    if folder is None:
        return torch.empty(*shape, dtype=dtype, device=device)
    numbers = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="orthokv-states-") as file:
            # Reserved now where the system can: on a disk that is full later, writing a page would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype).view(*shape)
    except OSError as error:
        raise StorageError(f"activations cannot be spilled to {folder}: {error.strerror}") from error


def positions_from(start: int, tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What a forward is told of ``tokens`` ``[..., T]`` that begin at ``start``: nothing at 0, where it counts itself."""
    if start == 0:
        return {}
    return {"position_ids": torch.arange(start, start + tokens.shape[-1], device=device).unsqueeze(0)}


@contextmanager
def layers_replaced(layers: nn.ModuleList, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The model's own forward around other layers: what comes before and after them is never re-implemented here."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def pass_on(*, tuples: bool) -> Callable[..., Any]:
    """A layer that returns what it is given, in the form that the layers of a model have: a few return a tuple."""

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        return (hidden_states, None) if tuples else hidden_states

    return forward


class LayerWalk:
    """Feeds equally long blocks through a model one decoder layer at a time.

    Args:
        model: a supported model in evaluation mode, whole or streamed from disk.
        tokens: int64 ``[num_samples, sequence_length]``.
        batch_size: blocks per forward of a layer.
        starts: position of each block's first token; None: all begin at 0.

    Raises:
        InvalidSetting: a block begins where this model has no position for it.

    ``inputs`` and ``outputs`` hold the present layer's hidden states, ``[num_samples, T, hidden]`` in the model's dtype, on its
    device or spilled to files.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        batch_size: int,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.starts = [0] * len(tokens) if starts is None else list(starts)
        if any(self.starts):
            check_positions(AttentionGeometry.from_config(model.config), max(self.starts) + tokens.shape[1])
        self.layers = decoder_layers(model)
        self.device = model.device
        self.batch_size = batch_size
        self.tokens = tokens
        first, arguments = self._first_input(tokens[:1], 0)
        self.inputs, self.outputs = (
            empty_states((len(tokens), *first.shape[1:]), first.dtype, self.device) for _ in range(2)
        )
        for batch in self.batches(len(tokens)):
            self.inputs[batch] = self._by_start(
                range(len(tokens))[batch],
                tokens[batch],
                lambda part, start: self._first_input(part, start)[0],
            )
        # A few models' layers return a tuple; what stands in for a layer must do as they do.
        with torch.no_grad():
            self._pass_on = pass_on(tuples=isinstance(self.layers[0](first, **arguments), tuple))
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        for start in sorted(set(self.starts)):
            found = self._layer_arguments(tokens[:1], start)
            known = next(iter(self._arguments.values()), found)
            self._arguments[start] = [_sharing(own, other) for own, other in zip(found, known, strict=True)]

    def __len__(self) -> int:
        return len(self.layers)

    def batches(self, blocks: int) -> Iterator[slice]:
        """Slices of at most ``batch_size`` blocks, in order."""
        for start in range(0, blocks, self.batch_size):
            yield slice(start, min(start + self.batch_size, blocks))

    def _by_start(
        self, blocks: Sequence[int], states: Tensor, run: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """``run(states, start)`` on ``states`` ``[b, ...]`` of ``blocks``, apart for blocks that begin at other positions."""
        starts = [self.starts[block] for block in blocks]
        if len(set(starts)) == 1:
            return run(states, starts[0])
        rows = [[i for i, own in enumerate(starts) if own == start] for start in sorted(set(starts))]
        together = torch.cat([run(states[part], starts[part[0]]) for part in rows])
        order = torch.tensor([i for part in rows for i in part]).argsort()
        return together[order.to(together.device)]

    @torch.no_grad()
    def _first_input(self, tokens: Tensor, start: int) -> tuple[Tensor, dict[str, Any]]:
        """What the first layer is given: hidden states, and everything else."""
        found: list[tuple[Tensor, dict[str, Any]]] = []

        def stop(hidden_states: Tensor, **kwargs: Any) -> Any:
            found.append((hidden_states, kwargs))
            raise _Stop

        with layers_replaced(self.layers, [stop] * len(self)), suppress(_Stop):
            self._call(tokens, start)
        return found[0]

    @torch.no_grad()
    def _layer_arguments(self, tokens: Tensor, start: int) -> list[dict[str, Any]]:
        """What the model passes to each layer besides hidden states: the same for all blocks of one length and start."""
        seen: list[dict[str, Any]] = []

        def record(hidden_states: Tensor, **kwargs: Any) -> Any:
            seen.append(kwargs)
            if len(seen) == len(self):
                raise _Stop
            return self._pass_on(hidden_states)

        with layers_replaced(self.layers, [record] * len(self)), suppress(_Stop):
            self._call(tokens, start)
        return seen

    def _call(self, tokens: Tensor, start: int) -> Any:
        tokens = tokens.to(self.device)
        return self.model(tokens, use_cache=False, **positions_from(start, tokens, self.device))

    def forward(self, layer: int, hidden: Tensor, blocks: Sequence[int]) -> Tensor:
        """One decoder layer on ``hidden`` ``[b, T, hidden]`` of some blocks, through whatever the seam does there now."""

        def run(hidden: Tensor, start: int) -> Tensor:
            output = self.layers[layer](hidden.to(self.device), **self._arguments[start][layer])
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        return self._by_start(blocks, hidden, run)

    @torch.no_grad()
    def run(self, layer: int) -> None:
        """Fill ``outputs`` with what the layer makes of ``inputs``.

        Raises:
            InvalidModel: the layer produces numbers that are not finite.
        """
        self.through(layer, self.inputs, self.outputs, range(len(self.inputs)))

    @torch.no_grad()
    def through(self, layer: int, source: Tensor, target: Tensor, blocks: Sequence[int]) -> None:
        """Like :meth:`run`, on any hidden states ``[n, T, hidden]`` of ``n`` ``blocks``; ``target`` may be ``source``."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch in self.batches(len(source)):
            output = self.forward(layer, source[batch], blocks[batch])
            target[batch] = output
            finite &= output.isfinite().all()  # asked once: every question stops a GPU's queue
        if not bool(finite):
            raise InvalidModel(f"layer {layer} of the model produces values that are not finite")

    def advance(self) -> None:
        """Make the outputs the next layer's inputs."""
        self.inputs, self.outputs = self.outputs, self.inputs

    @torch.no_grad()
    def logits(self, hidden: Tensor, blocks: slice) -> Tensor:
        """Logits ``[b, T, vocabulary]`` of some blocks whose last layer's output is ``hidden`` ``[b, T, hidden]``.

        What follows the layers knows no positions, so these are the same wherever the blocks begin.
        """

        def last(hidden_states: Tensor, **kwargs: Any) -> Any:
            return self._pass_on(hidden.to(self.device))

        with layers_replaced(self.layers, [*[self._pass_on] * (len(self) - 1), last]):
            output = self.model(self.tokens[blocks].to(self.device), use_cache=False)
        return cast(Tensor, output.logits)


@torch.no_grad()
def run_and_measure(walk: LayerWalk, seam: Seam, layer: int, blocks: int) -> LayerMoments:
    """Run one layer uncompressed and collect its moments over the first ``blocks`` blocks on the way."""
    collector = _Collector(seam.geometry, walk.device)
    seam.observe(layer, collector)
    try:
        walk.through(layer, walk.inputs[:blocks], walk.outputs[:blocks], range(blocks))
    finally:
        seam.observe(layer, None)
    if blocks < len(walk.inputs):
        others = range(blocks, len(walk.inputs))
        walk.through(layer, walk.inputs[blocks:], walk.outputs[blocks:], others)
    return collector.moments()


class _Collector:
    """Sums outer products in float64, batch by batch, on the model's device."""

    def __init__(self, geometry: AttentionGeometry, device: torch.device) -> None:
        width, heads, head_dim = geometry.kv_width, geometry.kv_heads, geometry.head_dim
        self.tokens = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.sums = {name: zeros(width, width) for name in ("key", "value")}
        self.query = zeros(heads, head_dim, head_dim)
        self.means = {name: zeros(width) for name in ("key", "value")}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        batch, heads, tokens, head_dim = key.shape
        self.tokens += batch * tokens
        for name, x in (("key", key), ("value", value)):
            rows = x.transpose(1, 2).reshape(batch * tokens, heads * head_dim).double()
            self.sums[name] += rows.T @ rows
            self.means[name] += rows.sum(0)
        rows = query.transpose(0, 1).reshape(heads, -1, head_dim).double()
        self.query += rows.transpose(1, 2) @ rows

    def moments(self) -> LayerMoments:
        def mean(total: Tensor) -> Tensor:
            return total / max(self.tokens, 1)

        return LayerMoments(
            tokens=self.tokens,
            key=mean(self.sums["key"]),
            value=mean(self.sums["value"]),
            query=mean(self.query),
            key_mean=mean(self.means["key"]),
            value_mean=mean(self.means["value"]),
        )


@dataclass(frozen=True)
class Comparison:
    """A compressed layer against the original: relative Frobenius error, and mean cosine over tokens (paper, Fig. 6)."""

    error: float
    cosine: float


@dataclass(frozen=True)
class LayerTask:
    """One layer that has run on the blocks of a walk: what a basis costs there.

    The first ``blocks`` of them are for fitting and for the error surface; those behind are held out.
    """

    index: int
    walk: LayerWalk
    seam: Seam
    blocks: int

    @property
    def geometry(self) -> AttentionGeometry:
        return self.seam.geometry

    def loss(self, bases: LayerBases, blocks: list[int]) -> Tensor:
        """Squared relative error of the layer's output over some blocks, ``||Z - Z~||^2 / ||Z||^2`` (paper section 2)."""
        target = self._target(blocks)
        return (self._compressed(bases, blocks) - target).square().sum() / target.square().sum()

    @torch.no_grad()
    def compare(self, bases: LayerBases, blocks: list[int]) -> Comparison:
        """Error and cosine over some blocks, in slices of the walk's batch size."""
        difference = norm = cosine = 0.0
        tokens = 0
        for start in range(0, len(blocks), self.walk.batch_size):
            part = blocks[start : start + self.walk.batch_size]
            target, output = self._target(part), self._compressed(bases, part)
            difference += float((output - target).double().square().sum())
            norm += float(target.double().square().sum())
            cosine += float(nn.functional.cosine_similarity(output, target, dim=-1).double().sum())
            tokens += target.shape[0] * target.shape[1]
        return Comparison((difference / norm) ** 0.5, cosine / tokens)

    def _target(self, blocks: list[int]) -> Tensor:
        return self.walk.outputs[blocks].to(self.walk.device).float()

    def _compressed(self, bases: LayerBases, blocks: list[int]) -> Tensor:
        before = self.seam.state(self.index).bases
        # Bases are kept in float32 and used in the model's dtype; gradients come back through the cast.
        dtype = self.walk.inputs.dtype
        key, value = (None if basis is None else basis.to(dtype=dtype) for basis in (bases.key, bases.value))
        self.seam.set_bases(self.index, Bases(key, value, bases.store_dtype))
        try:
            return self.walk.forward(self.index, self.walk.inputs[blocks], blocks).float()
        finally:
            self.seam.set_bases(self.index, before)


@dataclass(frozen=True)
class LayerView(LayerTask):
    """What a method may use to fit a layer: besides its loss, the moments and the output projection.

    ``output_weight`` is float64 ``[hidden, heads * head_dim]``.
    """

    moments: LayerMoments
    output_weight: Tensor


def view_layer(walk: LayerWalk, seam: Seam, layer: int, blocks: int | None = None) -> LayerView:
    """Run a layer and return everything that fitting it on the first ``blocks`` blocks needs (None: on all)."""
    blocks = len(walk.inputs) if blocks is None else blocks
    moments = run_and_measure(walk, seam, layer, blocks)
    architecture = architecture_of(seam.model.config)
    output = seam.modules[layer].get_submodule(architecture.output)
    weight = cast(Tensor, output.weight).detach().double()
    return LayerView(layer, walk, seam, blocks, moments, weight)
