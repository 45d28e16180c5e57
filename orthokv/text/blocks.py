"""Calibration and evaluation text: from a file, a hub data set or the model itself to packed token blocks.

Everything streams: a source is read one row or chunk at a time, and only until there are enough tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from orthokv.spec.errors import InvalidDataset, InvalidSetting, StorageError


def evenly(count: int, wanted: int) -> list[int]:
    """`min(wanted, count)` indices spread evenly over `range(count)`: every part of a text or mixture has its share."""
    wanted = min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def starts_over(positions: int, length: int, count: int) -> list[int]:
    """Where `count` blocks of `length` tokens begin so that together they cover positions `0..positions - 1`.

    At as many places as blocks laid end to end would need (`count`, where that is fewer), evenly from 0 to ``positions -
    length``: with fewer, the positions between them are served worse (decision 10). All have equally many blocks, in an
    order that gives neighbours and evenly spaced blocks different ones: errors are measured on a few evenly spaced blocks,
    and each text of a mixture is a run of them.
    """
    places = min(count, -(-positions // length))
    starts = [place * (positions - length) // max(places - 1, 1) for place in range(places)]
    # Multiples of an irrational number, modulo 1, are spread evenly, and so are those of each step and run.
    order = sorted(range(count), key=lambda i: i * math.sqrt(2) % 1)
    return [starts[rank * places // count] for _, rank in sorted(zip(order, range(count), strict=True))]


class Block(NamedTuple):
    """Token ids, int64 `[T]`, and the position of the first."""

    tokens: torch.Tensor
    start: int = 0


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed text. `tokens`: int64 `[num_samples, sequence_length]`, on the CPU.

    `digest` is the hex sha256 over shape and token ids, both little-endian int64. `source` says
    where the text came from. `starts` holds the position of each sample's first token: 0 unless `placed` put it
    elsewhere. It says how a text is used, not which text it is, so the digest leaves it out.
    """

    tokens: torch.Tensor
    digest: str
    source: str
    starts: tuple[int, ...]

    @classmethod
    def of(cls, tokens: torch.Tensor, source: str) -> Blocks:
        """Blocks of `tokens` with their digest; raises InvalidDataset for another shape or dtype."""
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.numel() == 0:
            shape = f"{tokens.dtype} {list(tokens.shape)}"
            raise InvalidDataset(f"token blocks must be torch.int64 [samples, length], not {shape}")
        tokens = tokens.detach().cpu().contiguous()
        content = hashlib.sha256(struct.pack("<2q", *tokens.shape))
        content.update(tokens.numpy().astype("<i8", copy=False).data)
        return cls(tokens, content.hexdigest(), source, (0,) * len(tokens))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> Block:
        return Block(self.tokens[index], self.starts[index])

    def __iter__(self) -> Iterator[Block]:
        return map(Block, self.tokens, self.starts)

    @property
    def positions(self) -> int:
        """The positions that the samples reach: `0..positions - 1`."""
        return max(self.starts) + self.tokens.shape[1]

    def placed(self, starts: Sequence[int]) -> Blocks:
        """The same samples, begun at other positions; raises InvalidSetting unless there is one, from 0, for each."""
        if len(starts) != len(self) or min(starts) < 0:
            raise InvalidSetting(f"{len(self)} samples cannot begin at positions {list(starts)}")
        return replace(self, starts=tuple(starts))

    def spread(self, positions: int, holdout: int) -> Blocks:
        """The same samples, begun all over `0..positions - 1`: so are both parts of `split`."""
        length, held = self.tokens.shape[1], evenly(len(self), holdout)
        parts = [starts_over(positions, length, n) for n in (len(self) - len(held), len(held))]
        fitting, held_out = map(iter, parts)
        return self.placed([next(held_out) if i in held else next(fitting) for i in range(len(self))])

    def take(self, indices: Sequence[int]) -> Blocks:
        """The samples at `indices`, in that order."""
        return Blocks.of(self.tokens[list(indices)], self.source).placed([self.starts[i] for i in indices])

    def split(self, holdout: int) -> tuple[Blocks, Blocks]:
        """All but `holdout` evenly spaced samples, and those; raises InvalidSetting where one part is empty."""
        if not 1 <= holdout < len(self):
            raise InvalidSetting(f"a holdout of {holdout} leaves one part of {len(self)} samples empty")
        held = evenly(len(self), holdout)
        kept = sorted(set(range(len(self))) - set(held))
        return self.take(kept), self.take(held)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; raises StorageError."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            # One key: several would come in another order in every process, and the file in other bytes.
            described = json.dumps({"digest": self.digest, "source": self.source, "starts": self.starts})
            save_file({"tokens": self.tokens}, partial, {"orthokv": described})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"token blocks cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Blocks:
        """Read what `save` wrote; raises InvalidDataset where it is missing, truncated or altered."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tokens = file.get_tensor("tokens")
            described = json.loads(metadata["orthokv"])
            digest, source = described["digest"], described["source"]
            starts = described.get("starts")  # files written before starts were recorded have none
        except (KeyError, ValueError) as error:
            raise InvalidDataset(f"{path} holds no token blocks: {error} is missing") from error
        except (OSError, SafetensorError) as error:
            raise InvalidDataset(f"token blocks {path} cannot be read: {error}") from error
        blocks = cls.of(tokens, source)
        if blocks.digest != digest:
            raise InvalidDataset(f"token blocks {path} were altered: their digest is not {digest}")
        if starts is None:
            return blocks
        if not isinstance(starts, list) or not all(type(start) is int for start in starts):
            raise InvalidDataset(f"token blocks {path} begin at {starts!r}, which are not positions")
        try:
            return blocks.placed(starts)
        except InvalidSetting as error:
            raise InvalidDataset(f"token blocks {path}: {error}") from error
