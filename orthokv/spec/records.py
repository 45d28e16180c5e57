"""What profiles and checkpoints say of themselves, as typed records; and the one door where older ones are brought up to date.

Files are JSON; a record is the same object with its fields typed. Code behind the door reads today's fields only.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NotRequired, TypedDict, cast

from orthokv.spec.methods import MethodSettings
from orthokv.spec.vocabulary import KeyMode, Sharing, SharingChoice


class Producer(TypedDict):
    name: str
    version: str


class BaseModel(TypedDict):
    """The model that bases were fitted for; `fingerprints` holds the digest of its key and value weights in each dtype."""

    id: str
    revision: str | None
    digest: str
    fingerprints: dict[str, str]


class Dataset(TypedDict):
    """The calibration text: `positions` says how far the blocks reach, `held_out` how many of them were not fitted on."""

    source: str
    digest: str
    num_samples: int
    sequence_length: int
    positions: int
    held_out: int


class Method(TypedDict):
    """A method by its name, the steps of the last stage, and its own settings (`orthokv.spec.methods`) beside them."""

    name: str
    refine_steps: int
    polish_steps: NotRequired[int]
    propagate: NotRequired[float]


class SideRank(TypedDict):
    rank: int
    total: int
    per_head: float


class LayerRanks(TypedDict):
    sharing: Sharing
    key: SideRank
    value: SideRank


class CacheSize(TypedDict):
    """Bytes of a live cache; `number_bytes` of each latent number."""

    bytes_per_token: int
    bytes_per_token_dense: int
    kept: float
    number_bytes: int


class Codec(TypedDict):
    name: str


def method_record(settings: MethodSettings, propagate: float | None) -> Method:
    """A method before its last stage."""
    record = {"name": settings.name, **asdict(settings), "refine_steps": 0}
    return cast(Method, record if propagate is None else {**record, "propagate": propagate})


class CheckpointRecord(TypedDict):
    """`orthokv.json`."""

    format_version: int
    producer: Producer
    form: str
    base_model: BaseModel
    geometry: dict[str, Any]
    key_mode: KeyMode
    sharing: SharingChoice
    codec: Codec
    ranks: list[LayerRanks]
    cache: CacheSize
    calibrated_positions: int
    dataset: Dataset
    method: Method
    seed: int
    plan: dict[str, Any]
    measured: dict[str, Any] | None


def upgrade_checkpoint(record: dict[str, Any]) -> CheckpointRecord:
    """`orthokv.json` of any time as today's; KeyError, TypeError or AttributeError where it is none."""
    dataset, measured = _upgrade_dataset(record["dataset"]), record.get("measured")
    if measured is not None and isinstance(measured.get("dataset"), dict):
        # Blocks began at 0 before it was said where they begin.
        measured = {**measured, "dataset": _with(measured["dataset"], starts=[0])}
    upgraded = _with(record, calibrated_positions=dataset["positions"])
    upgraded |= {
        "dataset": dataset,
        "method": _upgrade_method(record["method"]),
        # One sharing for all layers, before they could differ.
        "ranks": [_with(entry, sharing=record["sharing"]) for entry in record["ranks"]],
        "cache": _with(record["cache"], number_bytes=2),
        "measured": measured,
    }
    return cast(CheckpointRecord, upgraded)  # the reader checks what the file holds


def upgrade_profile(record: dict[str, Any]) -> dict[str, Any]:
    """`profile.json` of any time as today's; KeyError or TypeError where it is none."""
    layers = [_with(x, sharing=record["sharing"], spread=None, candidates=[]) for x in record["layers"]]
    return {
        **record,
        "dataset": _upgrade_dataset(record["dataset"]),
        "method": _upgrade_method(record["method"]),
        "layers": layers,
    }


def _upgrade_dataset(found: dict[str, Any]) -> Dataset:
    """All blocks began at 0 before they could begin elsewhere."""
    return cast(Dataset, _with(found, positions=found["sequence_length"]))


def _upgrade_method(found: dict[str, Any]) -> Method:
    """There was no last stage before its steps were recorded."""
    return cast(Method, _with(found, refine_steps=0))


def _with(found: dict[str, Any], **missing: Any) -> dict[str, Any]:
    """A record with fields that it lacks, behind those that it has: what is there keeps its order."""
    return {**found, **{name: value for name, value in missing.items() if name not in found}}
