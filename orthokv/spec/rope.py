"""Rotary parameters of a `config.json`, in the form of today whatever the form of the file.

Files of before transformers 5 have `rope_theta` and `rope_scaling` beside each other, where today's have one
`rope_parameters`. Names, defaults and the order of preference are those of transformers: bases are recognised by a digest of
the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthokv.spec.architectures import FULL, SLIDING, ModelType
from orthokv.spec.fields import invalid, whole

# Types that stretch a context, of which the length before that is recorded.
_STRETCHED = ("llama3", "yarn", "longrope")
_ORIGINAL = "original_max_position_embeddings"


def rope_parameters(
    kind: ModelType, config: Mapping[str, Any], layer_types: Sequence[str], max_positions: int
) -> dict[str, Any]:
    """The rotary parameters of a model with rotary embedding.

    Args:
        layer_types: of all layers.

    Raises:
        InvalidModel: a field is not what it has to be.
    """
    scaling, given = _table(config, "rope_scaling"), _table(config, "rope_parameters")
    theta: Any = config.get(kind.name("rope_theta"), kind.rope_theta)
    partial: Any = config.get(kind.name("partial_rotary_factor"), kind.partial_rotary_factor)
    if kind.tables_by_layer_type:
        rope = _by_layer_type(kind, config, given, scaling)
        theta = partial = None  # each type has its own
    else:
        rope = scaling or (dict(kind.rope or {}) if given is None else given)
    # A type counts as one only where the configuration lists types.
    nested = [name for name in rope if kind.lists_layer_types and name in layer_types]
    tables = [(f"rope_parameters.{name}", rope[name]) for name in nested] or [("rope_parameters", rope)]
    for name, table in tables:
        if table is None and nested:
            continue  # layers of this type are not rotated
        if not isinstance(table, dict):
            raise invalid(name, "an object", table)
        table.setdefault("rope_theta", theta)
        if partial is not None or kind.partial_rotary_factor is not None:
            table.setdefault("partial_rotary_factor", partial)
        table.setdefault("rope_type", table.get("type", "default"))
        _check(name, table)
        if table["rope_type"] in _STRETCHED:
            _record_original(kind, config, table, max_positions)
        table["rope_type"] = (kind.rope_aliases or {}).get(table["rope_type"], table["rope_type"])
    _check_values("rope_parameters", rope)
    return rope


def _by_layer_type(
    kind: ModelType, config: Mapping[str, Any], given: dict[str, Any] | None, scaling: dict[str, Any] | None
) -> dict[str, Any]:
    """One table for layers that see all tokens and one for those with a window; only the first is ever stretched."""
    rope = {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "default"}} if given is None else given
    if scaling:
        if not isinstance(rope.get(FULL), dict):
            raise invalid(f"rope_parameters.{FULL}", "an object", rope.get(FULL))
        rope[FULL].update(scaling)
    thetas = {
        FULL: config.get("rope_theta", kind.rope_theta),
        SLIDING: config.get("rope_local_base_freq", kind.local_theta),
    }
    for name, theta in thetas.items():
        table = rope[name] = {"rope_type": "default"} if rope.get(name) is None else rope[name]
        if not isinstance(table, dict):
            raise invalid(f"rope_parameters.{name}", "an object", table)
        table.setdefault("rope_theta", theta)
    return rope


def _record_original(
    kind: ModelType, config: Mapping[str, Any], table: dict[str, Any], max_positions: int
) -> None:
    """The context before it was stretched: of a field of its own, of the table, or as long as now."""
    if kind.original_positions is None:
        table.setdefault(_ORIGINAL, max_positions)
    else:
        table[_ORIGINAL] = whole(_ORIGINAL, config.get(_ORIGINAL, kind.original_positions))


def _check(name: str, table: Mapping[str, Any]) -> None:
    if not isinstance(table["rope_type"], str):
        raise invalid(f"{name}.rope_type", "a word", table["rope_type"])
    for field in ("rope_theta", "partial_rotary_factor"):
        value = table.get(field, 1)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise invalid(f"{name}.{field}", "a number above 0", value)


def _table(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A copy of an object of the configuration, and of those in it; None where there is none."""
    table = config.get(name)
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise invalid(name, "an object", table)
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _check_values(name: str, table: Mapping[str, Any], depth: int = 0) -> None:
    """Numbers, words, and lists of them: nothing that a digest could stumble over."""
    for field, value in table.items():
        if isinstance(value, Mapping) and depth == 0:
            _check_values(f"{name}.{field}", value, depth + 1)
            continue
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str | int | float | bool | None):
                raise invalid(f"{name}.{field}", "a number, a word or a list of them", one)
