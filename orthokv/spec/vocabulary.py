"""Words of the library that need no computation: names a user may give, and their defaults."""

from __future__ import annotations

from typing import Literal

KeyMode = Literal["pre", "post"]


# Which heads of a layer share a basis.
Sharing = Literal["head", "tied", "pair", "quad", "joint"]


# What a fit is asked for: ``auto`` chooses layer by layer (:mod:`orthokv.fit.grouping`).
SharingChoice = Literal["head", "tied", "pair", "quad", "joint", "auto"]


KEY_MODES: tuple[KeyMode, ...] = ("pre", "post")


SHARINGS: tuple[Sharing, ...] = ("head", "tied", "pair", "quad", "joint")


SHARING_CHOICES: tuple[SharingChoice, ...] = (*SHARINGS, "auto")


# KV heads in a group, where that is not all of them.
GROUP_HEADS = {"head": 1, "tied": 1, "pair": 2, "quad": 4}
