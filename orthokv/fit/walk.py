"""One streaming pass over the calibration blocks, layer by layer, with bounded memory.

At any time the inputs and the outputs of a single decoder layer are held. Every layer sees *uncompressed* inputs, so layers
are independent and can be fitted on different machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthokv.models.geometry import decoder_layers, geometry_of
from orthokv.models.states import empty_states, layers_replaced, pass_on, positions_from
from orthokv.spec.errors import InvalidModel
from orthokv.spec.geometry import check_positions


class _Stop(Exception):
    """Ends a forward once what was to be seen of it is known."""


def _with_shared_tensors(arguments: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with the tensors of `known` where they are equal: a mask, the largest, is so at every start."""

    def shared(value: Any, other: Any) -> Any:
        same = isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape
        return other if same and torch.equal(value, other) else value

    return {name: shared(value, known.get(name)) for name, value in arguments.items()}


class LayerWalk:
    """Feeds equally long blocks through a model one decoder layer at a time.

    Args:
        model: a supported model in evaluation mode, whole or streamed from disk.
        tokens: int64 `[num_samples, sequence_length]`.
        batch_size: blocks per forward of a layer.
        starts: position of each block's first token; None: all begin at 0.

    Raises:
        InvalidSetting: a block begins where this model has no position for it.

    `inputs` and `outputs` hold the present layer's hidden states, `[num_samples, T, hidden]` in the model's dtype, on its
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
            check_positions(geometry_of(model.config), max(self.starts) + tokens.shape[1])
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
            self._arguments[start] = [
                _with_shared_tensors(own, other) for own, other in zip(found, known, strict=True)
            ]

    def __len__(self) -> int:
        return len(self.layers)

    def batches(self, blocks: int) -> Iterator[slice]:
        """Slices of at most `batch_size` blocks, in order."""
        for start in range(0, blocks, self.batch_size):
            yield slice(start, min(start + self.batch_size, blocks))

    def _by_start(
        self, blocks: Sequence[int], states: Tensor, run: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """`run(states, start)` on `states` `[b, ...]` of `blocks`, apart for blocks that begin at other positions."""
        starts = [self.starts[block] for block in blocks]
        if len(set(starts)) == 1:
            return run(states, starts[0])
        # Rows of one start together, then back into the order they came in: `argsort` of an order is its inverse.
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
        """One decoder layer on `hidden` `[b, T, hidden]` of some blocks, through whatever the seam does there now."""

        def run(hidden: Tensor, start: int) -> Tensor:
            output = self.layers[layer](hidden.to(self.device), **self._arguments[start][layer])
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        return self._by_start(blocks, hidden, run)

    @torch.no_grad()
    def run(self, layer: int) -> None:
        """Fill `outputs` with what the layer makes of `inputs`.

        Raises:
            InvalidModel: the layer produces numbers that are not finite.
        """
        self.through(layer, self.inputs, self.outputs, range(len(self.inputs)))

    @torch.no_grad()
    def through(self, layer: int, source: Tensor, target: Tensor, blocks: Sequence[int]) -> None:
        """Like `run`, on any hidden states `[n, T, hidden]` of `n` `blocks`; `target` may be `source`."""
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
        """Logits `[b, T, vocabulary]` of some blocks whose last layer's output is `hidden` `[b, T, hidden]`.

        What follows the layers knows no positions, so these are the same wherever the blocks begin.
        """

        def last(hidden_states: Tensor, **kwargs: Any) -> Any:
            return self._pass_on(hidden.to(self.device))

        with layers_replaced(self.layers, [*[self._pass_on] * (len(self) - 1), last]):
            output = self.model(self.tokens[blocks].to(self.device), use_cache=False)
        return cast(Tensor, output.logits)
