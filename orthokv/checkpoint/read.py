"""Reading and verifying a checkpoint: tensors and JSON, no modelling code and no method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from orthokv.bases.basis import Bases, Basis
from orthokv.bases.manifold import orthonormality_error
from orthokv.files.digests import read_sums, verify_files
from orthokv.files.reading import read_json, read_safetensors
from orthokv.spec.codec import CodecSpec, codec_spec
from orthokv.spec.errors import InvalidCheckpoint, InvalidSetting
from orthokv.spec.footprint import Footprint, LayerPlan, SidePlan
from orthokv.spec.geometry import Geometry
from orthokv.spec.names import CONFIG, FORMAT_VERSION, TENSORS
from orthokv.spec.records import CheckpointRecord, upgrade_checkpoint
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import (
    CODECS,
    KEY_MODES,
    SHARING_CHOICES,
    SHARINGS,
    WEIGHT_DTYPES,
    KeyMode,
    Sharing,
    SharingChoice,
)

_REQUIRED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "base_model": {"id": str, "digest": str, "fingerprints": dict},
    "cache": {"bytes_per_token": int, "bytes_per_token_dense": int, "kept": (int, float)},
    "dataset": {"source": str, "digest": str, "num_samples": int, "sequence_length": int},
    "method": {"name": str},
}


# float32 bases of a few thousand columns are orthonormal to about 1e-6; a flipped byte is not.
ORTHONORMALITY_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        folder: where it lies.
        config: `orthokv.json`: the base model, the ranks, the cache's bytes, the calibration text, what was measured.
        geometry: of the model that it is for.
        key_mode: keys are cached before (`pre`) or after (`post`) rotary embedding.
        sharing: which KV heads share a basis; see `FitSettings`.
        codec: how latents are stored.
        bases: of each layer, one basis for keys and one for values: float32, on the CPU.
    """

    folder: Path
    config: CheckpointRecord
    geometry: Geometry
    key_mode: KeyMode
    sharing: SharingChoice
    codec: str
    bases: tuple[Bases, ...]

    def layers(self, codec: CodecSpec | None = None) -> list[LayerPlan]:
        """What is stored of each layer, under the checkpoint's own codec or another."""
        used = codec or codec_spec(self.codec, self.config["cache"]["number_bytes"])
        return [
            LayerPlan(*(SidePlan(basis.rank, basis.groups, used) for basis in (layer.key, layer.value)))
            for layer in self.bases
        ]

    def declared_bytes(self, *, sequences: int, tokens: int, codec: CodecSpec | None = None) -> int:
        """Bytes that a cache of `sequences` x `tokens` holds, under the checkpoint's own codec or another."""
        return sequences * Footprint(self.geometry, self.key_mode).cache_bytes(self.layers(codec), tokens)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read and verify a checkpoint: digests, version, shapes, finiteness and orthonormality.

    Args:
        folder: a local folder; `attach` also takes a hub id.

    Raises:
        InvalidCheckpoint: anything is missing or does not hold; names the file, tensor or field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidCheckpoint(f"{folder} is not a folder")
    verify_files(folder, [CONFIG, TENSORS])
    described = read_json(folder / CONFIG)
    if described.get("format_version") != FORMAT_VERSION:
        raise InvalidCheckpoint(
            f"checkpoint format version {described.get('format_version')!r} is not {FORMAT_VERSION}"
        )
    tensors, _ = read_safetensors(folder / TENSORS)
    try:
        config = upgrade_checkpoint(described)
        geometry = Geometry.from_dict(config["geometry"])
        key_mode, sharing, codec = config["key_mode"], config["sharing"], config["codec"]["name"]
        ranks = [(int(entry["key"]["rank"]), int(entry["value"]["rank"])) for entry in config["ranks"]]
        sharings = [entry["sharing"] for entry in config["ranks"]]
        _require(described)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidCheckpoint(f"{CONFIG} lacks a field or holds a wrong one ({error!r})") from error
    for name, value, allowed in (
        ("key_mode", key_mode, KEY_MODES),
        ("sharing", sharing, SHARING_CHOICES),
        *(("sharing of a layer", found, SHARINGS if sharing == "auto" else (sharing,)) for found in sharings),
        ("codec", codec, CODECS),
    ):
        if value not in allowed:
            raise InvalidCheckpoint(f"{CONFIG}: {name} {value!r} is not one of {', '.join(allowed)}")
    if len(ranks) != geometry.layers:
        raise InvalidCheckpoint(
            f"{CONFIG} has ranks for {len(ranks)} layers, its model has {geometry.layers}"
        )
    # Of the tensors alone: measurements are written into the configuration later.
    digest = read_sums(folder)[TENSORS]
    bases = tuple(
        replace(_read_layer(tensors, i, pair, found, geometry), codecs=(codec, codec), identity=digest)
        for i, (pair, found) in enumerate(zip(ranks, sharings, strict=True))
    )
    return Checkpoint(folder, config, geometry, key_mode, sharing, codec, bases)


def _require(config: dict[str, Any]) -> None:
    """Fields that are read long after loading; KeyError or TypeError where one is missing or of another kind."""
    for section, fields in _REQUIRED.items():
        for field, kind in fields.items():
            value = config[section][field]
            if not isinstance(value, kind):
                raise TypeError(f"{section}.{field} is {value!r}")
    for dtype in WEIGHT_DTYPES:
        if not isinstance(config["base_model"]["fingerprints"][dtype], str):
            raise TypeError(f"base_model.fingerprints.{dtype}")


def _read_layer(
    tensors: dict[str, Tensor],
    layer: int,
    ranks: tuple[int, int],
    sharing: Sharing,
    geometry: Geometry,
) -> Bases:
    found: list[Basis] = []
    for side, rank in zip(("key", "value"), ranks, strict=True):
        try:
            stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=side == "key")
        except InvalidSetting as refused:
            raise InvalidCheckpoint(f"{CONFIG}: layer {layer}: {refused}") from refused
        name = f"layers.{layer}.{side}.encoder"
        if not 1 <= rank <= width:
            raise InvalidCheckpoint(f"layer {layer}: {side} rank {rank} is outside 1..{width}")
        encoder = tensors.get(name)
        if encoder is None or tuple(encoder.shape) != (stored, width, rank):
            shape = None if encoder is None else tuple(encoder.shape)
            raise InvalidCheckpoint(f"{TENSORS}: {name} has shape {shape}, not {(stored, width, rank)}")
        decoder = tensors.get(f"layers.{layer}.{side}.decoder", encoder)
        if decoder.shape != encoder.shape:
            raise InvalidCheckpoint(f"{TENSORS}: encoder and decoder of layer {layer} {side} differ in shape")
        if decoder is encoder and (error := orthonormality_error(encoder)) > ORTHONORMALITY_TOLERANCE:
            raise InvalidCheckpoint(f"{TENSORS}: {name} is not orthonormal (off by {error:.2g})")
        found.append(Basis(encoder, decoder, geometry.kv_heads, geometry.head_dim))
    return Bases(found[0], found[1])
