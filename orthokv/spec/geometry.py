"""What a model's attention looks like: the shape that bases, plans and bytes depend on. Data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from orthokv.spec.errors import InvalidSetting, UnsupportedModel

# Rotary types whose tables depend on nothing but the position. Dynamic and long variants change the tables with the
# sequence length, so keys rebuilt later would be rotated by other angles than the stock model used.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Geometry:
    """Shape of a decoder's attention.

    `rope_hash` identifies the rotary parameters: bases fitted under one rotary embedding are wrong under another.

    `windows` holds the sliding window of each layer in tokens (None: the layer sees all), `rotated` whether a layer
    uses rotary embedding. Either is None where no layer differs from the plain case: no windows, all or none rotated.
    """

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope: dict[str, Any] | None
    rope_hash: str
    windows: tuple[int | None, ...] | None = None
    rotated: tuple[bool, ...] | None = None

    @property
    def kv_width(self) -> int:
        """Numbers that one token adds to the keys (or to the values) of one layer."""
        return self.kv_heads * self.head_dim

    def uses_rope(self, layer: int) -> bool:
        return self.rope is not None and (self.rotated is None or self.rotated[layer])

    def window(self, layer: int) -> int | None:
        return None if self.windows is None else self.windows[layer]

    def rotated_windows(self) -> set[int | None]:
        """The windows of the layers that use rotary embedding: layers with the same one share their positions."""
        return {self.window(layer) for layer in range(self.layers) if self.uses_rope(layer)}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Geometry:
        """The reverse of `to_dict`; TypeError for a missing, unknown or wrongly typed field."""
        lists = {name: tuple(data[name]) for name in ("windows", "rotated") if data.get(name) is not None}
        geometry = cls(**{**data, **lists})
        for name in ("layers", "hidden_size", "heads", "kv_heads", "head_dim", "max_positions"):
            value = getattr(geometry, name)
            if type(value) is not int or value < 1:
                raise TypeError(f"geometry.{name} is {value!r}")
        for value in geometry.windows or ():
            if value is not None and (type(value) is not int or value < 1):
                raise TypeError(f"geometry.windows holds {value!r}")
        for name, values in lists.items():
            if len(values) != geometry.layers:
                raise TypeError(f"geometry.{name} has {len(values)} entries for {geometry.layers} layers")
        return geometry


def rope_types(geometry: Geometry) -> set[str]:
    """The rotary types that a model uses; models with tables for each layer type have several parameter sets."""
    if geometry.rope is None:
        return set()
    nested = [x for x in geometry.rope.values() if isinstance(x, dict)]
    return {str(x.get("rope_type", "default")) for x in nested or [geometry.rope]}


def check_key_mode(geometry: Geometry, key_mode: str) -> None:
    """Refuse a key mode that the model's rotary embedding cannot serve exactly."""
    changing = sorted(rope_types(geometry) - set(STATIC_ROPE))
    if key_mode == "pre" and changing:
        raise UnsupportedModel(
            f"key mode 'pre' needs rotary tables that do not change with the length; "
            f"this model's rope_type is {changing[0]!r} (use key mode 'post')"
        )


def check_positions(geometry: Geometry, positions: int) -> None:
    """Refuse text at positions up to `positions - 1` where that means nothing.

    Raises:
        InvalidSetting: no layer uses rotary embedding, or the model's context is shorter.
    """
    if geometry.rope is None:
        raise InvalidSetting(
            f"a setting of positions has no effect on a model without rotary embedding ({geometry.model_type})"
        )
    if positions > geometry.max_positions:
        raise InvalidSetting(f"{positions} positions are more than the model's {geometry.max_positions}")
