"""Which heads of a layer may share a basis, and how wide a group is."""

from __future__ import annotations

from orthokv.spec.errors import InvalidSetting
from orthokv.spec.geometry import Geometry
from orthokv.spec.vocabulary import GROUP_HEADS, Sharing, SharingChoice


def group_width(sharing: Sharing, kv_heads: int, head_dim: int, *, keys: bool) -> tuple[int, int]:
    """`(stored groups, width)` of a basis.

    `tied` is the papers' form: one basis for the keys of all heads of a layer, one per head for the values
    (EigenAttention as released, StiefAttention v1 section 3). `pair` and `quad` are groups of 2 and 4 neighbouring heads.

    Raises:
        InvalidSetting: the KV heads do not divide into such groups.
    """
    heads = kv_heads if sharing == "joint" else GROUP_HEADS[sharing]
    if kv_heads % heads:
        raise InvalidSetting(
            f"sharing {sharing!r} makes groups of {heads} KV heads, which do not divide this model's {kv_heads}"
        )
    stored = 1 if sharing == "tied" and keys else kv_heads // heads
    return stored, heads * head_dim


# What `auto` chooses from, narrowest first.
GROUPED: tuple[Sharing, ...] = ("pair", "quad", "joint")


def sharings_of(choice: SharingChoice, geometry: Geometry) -> tuple[Sharing, ...]:
    """The forms that a layer may take under a choice, narrowest first.

    For `auto` those of `GROUPED` that divide the KV heads; a group that would hold all of them is `joint`.

    Raises:
        InvalidSetting: the KV heads do not divide into the groups that were asked for.
    """
    heads = geometry.kv_heads
    if choice == "auto":
        return tuple(s for s in GROUPED if s == "joint" or _is_part(GROUP_HEADS[s], heads))
    group_width(choice, heads, geometry.head_dim, keys=True)
    return (choice,)


def _is_part(group: int, heads: int) -> bool:
    return group < heads and heads % group == 0
