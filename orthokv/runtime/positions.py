"""Positions of cached tokens. Keys cached before RoPE need theirs again, at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from orthokv.runtime.policy import Policy


class PositionBook:
    """Positions of all cached tokens (int32), shared by the layers of one cache that hold the same tokens.

    They are kept in a stock layer of the same policy, one number a token where keys have a head, so that windows, crops,
    beams and fixed buffers treat both alike. Only the `owner` (the first such layer) writes; the others read what it wrote
    in the same forward.
    """

    def __init__(self, owner: int, policy: Policy) -> None:
        self.owner = owner
        self.layer: Any = policy.layer()
        self.visible: Tensor | None = None  # [B, tokens attended to in this forward]

    def push(self, new: Tensor, batch: int) -> None:
        """Append `new` `[1 or B, T]`."""
        new = new.to(torch.int32).expand(batch, -1)[:, None, :, None]
        self.visible = self.layer.update(new, new[..., :0])[0][:, 0, :, 0]


def books_of(cache: Cache) -> dict[Policy, PositionBook]:
    """The books of a cache; they are copied and saved with it."""
    books: dict[Policy, PositionBook] = cache.__dict__.setdefault("_orthokv_books", {})
    return books


def book_of(cache: Cache, index: int, policy: Policy) -> PositionBook:
    """The book of all layers with a policy; layer `index` becomes its owner where it is new."""
    books = books_of(cache)
    if policy not in books:
        books[policy] = PositionBook(index, policy)
    return books[policy]
