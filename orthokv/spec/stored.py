"""Bytes of the files that a job leaves: what its bases, tables and descriptions take on disk, told before they are there.

Tensors are exact. Text is as long as text of that form is with numbers of the usual length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from orthokv.spec.codec import CodecSpec, codec_spec
from orthokv.spec.footprint import Footprint, LayerPlan, SidePlan, dense_bytes
from orthokv.spec.geometry import Geometry
from orthokv.spec.methods import METHODS
from orthokv.spec.names import CARD, CONFIG, PROFILE_JSON, PROFILE_TENSORS, TENSORS
from orthokv.spec.rankgrid import candidate_ranks
from orthokv.spec.settings import SPREAD_BLOCKS, FitSettings
from orthokv.spec.sharing import group_width, sharings_of
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import Sharing

# As safetensors calls them, with the bytes of a number.
DtypeName = Literal["F32", "F64", "I64"]
_NUMBER_BYTES: dict[DtypeName, int] = {"F32": 4, "F64": 8, "I64": 8}
Layout = tuple[DtypeName, tuple[int, ...]]

# A measured number, as long as most of them are in JSON.
_NUMBER = 0.012345678901234567
_DIGEST = "0" * 64
# Characters of what is said besides, measured: origin, data set and method in every description; and for each layer.
_ORIGIN, _CHECKPOINT, _CHECKPOINT_LAYER = 1010, 1750, 292
_MEASURED, _MEASURED_LAYER = 480, 48
_CARD, _CARD_LAYER, _CARD_MEASURED, _CARD_MEASURED_LAYER = 2560, 54, 440, 8
# Of the picture of a profile with 1, 2, ... panels, within a tenth; more layers have no more panels.
_PICTURE = (282, 321, 346, 344, 500, 583, 483, 550, 598, 651, 709, 785)
PICTURE_PANELS = len(_PICTURE)
# What a plan keeps where the budget is no share of the cache: in the middle, as nothing is known.
_UNKNOWN_SHARE = 0.5
# Of the latent numbers, those of keys: 30 % to 43 % in plans of trained models (demo-llama-3m and books-llama-31m, `kept` an
# eighth to a half).
_KEYS = 0.36


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of every file of a job, by the step that writes it. A full checkpoint has the model's own files besides.

    Attributes:
        blocks: the calibration tokens.
        layers: of each fitted layer a file.
        profile: the same layers together, and their description.
        picture: of the profile.
        checkpoint: bases at the plan's ranks, the profile once more, what is said of both.
        measured: the checkpoint's descriptions again, with its measurements.
    """

    blocks: int
    layers: int
    profile: int
    picture: int
    checkpoint: int
    measured: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def stored_bytes(geometry: Geometry, settings: FitSettings, target: Target) -> StoredBytes:
    """What a job leaves in the store.

    Three things are not known before the fit. `auto` is taken to choose the widest groups in every layer, as it did in trained
    models (`docs/decisions/0009-groups-of-heads.md`); with narrower ones there is less. A budget that is no share of the cache
    is taken to keep half. A plan is taken to give every layer the same, and keys 36 % of that, which matters for `tied` alone:
    there the matrices of keys are fewer than those of values.

    Raises:
        InvalidSetting: the KV heads do not divide into the groups that were asked for.
    """
    forms = sharings_of(settings.sharing, geometry)
    layer = _Layer(geometry, settings.method, forms[-1])
    count = geometry.layers
    record = _layer_record(layer, settings, forms)
    described = json.dumps({"layer": record, "geometry": geometry.to_dict()})
    # The longest index stands for all.
    one = safetensors_bytes(layer.tensors(count - 1), {"orthokv": described})
    whole = safetensors_bytes(_joined([layer.tensors(i) for i in range(count)]))
    profile = whole + _profile_text(geometry, record)
    ranks = layer.ranks(_share(geometry, layer, settings, target))
    bases = safetensors_bytes(_joined([layer.bases(i, *ranks) for i in range(count)]))
    geometry_text = _indented(geometry.to_dict())
    config = _CHECKPOINT + geometry_text + count * _CHECKPOINT_LAYER
    card = _CARD + count * _CARD_LAYER
    sums = sum(len(f"{_DIGEST}  {name}\n") for name in (CONFIG, TENSORS, PROFILE_JSON, PROFILE_TENSORS, CARD))
    measured = _MEASURED + _CARD_MEASURED + count * (_MEASURED_LAYER + _CARD_MEASURED_LAYER)
    return StoredBytes(
        blocks=blocks_bytes(settings.num_samples, settings.sequence_length),
        layers=count * one,
        profile=profile,
        picture=1000 * _PICTURE[min(count, PICTURE_PANELS) - 1],
        checkpoint=bases + profile + config + card + sums,
        measured=config + card + sums + measured,
    )


@dataclass(frozen=True)
class _Layer:
    """The tensors of a layer, by method and form."""

    geometry: Geometry
    method: str
    sharing: Sharing

    def group(self, side: str) -> tuple[int, int]:
        """`(stored groups, width)` of the keys, or of the values."""
        heads, head_dim = self.geometry.kv_heads, self.geometry.head_dim
        return group_width(self.sharing, heads, head_dim, keys=side == "key")

    def bases(self, index: int, rank_key: int, rank_value: int) -> dict[str, Layout]:
        """Encoders at some ranks, and decoders where they are other matrices."""
        found: dict[str, Layout] = {}
        for side, rank in (("key", rank_key), ("value", rank_value)):
            for part in ("encoder", "decoder")[: METHODS[self.method].matrices]:
                found[f"layers.{index}.{side}.{part}"] = "F32", (*self.group(side), rank)
        return found

    def tensors(self, index: int) -> dict[str, Layout]:
        """What a profile keeps: square bases, tables of errors, and singular values where the method has them."""
        (_, width_key), (_, width_value) = self.group("key"), self.group("value")
        table: Layout = "F64", (len(candidate_ranks(width_key)), len(candidate_ranks(width_value)))
        found: dict[str, Layout] = {f"layers.{index}.{name}": table for name in ("error", "cosine")}
        found |= self.bases(index, width_key, width_value)
        if METHODS[self.method].spectra:
            for side in ("key", "value"):
                found[f"layers.{index}.{side}.spectrum"] = "F32", self.group(side)
        return found

    def ranks(self, share: float) -> tuple[int, int]:
        """Ranks that together are a share of the widths."""
        (_, width_key), (_, width_value) = self.group("key"), self.group("value")
        # What values cannot take, as they are whole, is left to the keys.
        value = min(1.0, 2 * (1 - _KEYS) * share)
        return max(1, round((2 * share - value) * width_key)), max(1, round(value * width_value))

    def full(self, codec: CodecSpec) -> LayerPlan:
        """The layer whole."""
        (_, key), (_, value) = self.group("key"), self.group("value")
        width = self.geometry.kv_width
        return LayerPlan(SidePlan(key, width // key, codec), SidePlan(value, width // value, codec))


def layer_tensors(geometry: Geometry, method: str, sharing: Sharing, index: int) -> dict[str, Layout]:
    """The tensors of one layer of a profile: name to dtype and shape."""
    return _Layer(geometry, method, sharing).tensors(index)


def checkpoint_tensors(
    geometry: Geometry, method: str, sharing: Sharing, ranks: Sequence[tuple[int, int]]
) -> dict[str, Layout]:
    """The tensors of a checkpoint whose layers have these ranks of keys and values."""
    layer = _Layer(geometry, method, sharing)
    return _joined([layer.bases(index, *pair) for index, pair in enumerate(ranks)])


def blocks_bytes(samples: int, length: int) -> int:
    """The file of the calibration tokens."""
    described = {"digest": _DIGEST, "source": "text.jsonl", "starts": [0] * samples}
    return safetensors_bytes({"tokens": ("I64", (samples, length))}, {"orthokv": json.dumps(described)})


def safetensors_bytes(tensors: Mapping[str, Layout], metadata: Mapping[str, str] | None = None) -> int:
    """The size of a safetensors file: its header, as the library writes it, and the numbers."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (-_NUMBER_BYTES[item[1][0]], item[0])
    ):
        end = offset + _NUMBER_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def _layer_record(layer: _Layer, settings: FitSettings, forms: Sequence[Sharing]) -> dict[str, Any]:
    """What a profile says of a layer, with numbers of the usual length."""
    (_, key), (_, value) = layer.group("key"), layer.group("value")
    ranks_key, ranks_value = candidate_ranks(key), candidate_ranks(value)
    table = [[_NUMBER] * len(ranks_value)] * len(ranks_key)
    fitted = min(settings.num_samples - settings.holdout, max(settings.profile_samples, SPREAD_BLOCKS))
    compared = {"sharing": layer.sharing, "kept": [0.5, 0.25, 0.125], "error": [_NUMBER] * 3}
    return {
        "index": layer.geometry.layers - 1,
        "sharing": layer.sharing,
        "ranks_key": list(ranks_key),
        "ranks_value": list(ranks_value),
        "groups_key": layer.geometry.kv_width // key,
        "groups_value": layer.geometry.kv_width // value,
        "error": table,
        "cosine": table,
        "sensitivity": _NUMBER,
        "spread": {
            "rank_key": key // 4,
            "rank_value": value // 4,
            "fitting": [_NUMBER] * fitted,
            "held_out": [_NUMBER] * min(settings.holdout, SPREAD_BLOCKS),
        },
        "candidates": [compared] * len(forms) if len(forms) > 1 else [],
    }


def _profile_text(geometry: Geometry, record: Mapping[str, Any]) -> int:
    one, two = (_indented({"layers": [record] * count}) for count in (1, 2))
    return _ORIGIN + _indented(geometry.to_dict()) + geometry.layers * (two - one)


def _share(geometry: Geometry, layer: _Layer, settings: FitSettings, target: Target) -> float:
    """Of the widths, what the budget leaves for latents."""
    if target.budget.metric != "kept":
        return _UNKNOWN_SHARE
    latents = target.budget.value * dense_bytes(geometry) - Footprint(geometry, settings.key_mode).fixed()
    whole = geometry.layers * layer.full(codec_spec(target.codec)).token_bytes
    return min(1.0, max(0.0, latents / whole))


def _joined(tensors: Sequence[dict[str, Layout]]) -> dict[str, Layout]:
    return {name: layout for layer in tensors for name, layout in layer.items()}


def _indented(value: object) -> int:
    return len(json.dumps(value, indent=1))
