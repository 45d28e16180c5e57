"""The error-rank profile: the durable product of a fit. The ranks of a new budget need only this, no model and no GPU."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from orthokv.bases.basis import Bases, Basis
from orthokv.files.digests import SUMS, file_digest, verify_files
from orthokv.files.reading import read_json, read_safetensors
from orthokv.spec.errors import InvalidCheckpoint
from orthokv.spec.geometry import Geometry
from orthokv.spec.names import PROFILE_JSON, PROFILE_TENSORS
from orthokv.spec.records import BaseModel, Dataset, Method, upgrade_profile
from orthokv.spec.version import producer
from orthokv.spec.vocabulary import KEY_MODES, SHARING_CHOICES, SHARINGS, KeyMode, Sharing, SharingChoice

PROFILE_VERSION = 1

# Above this ratio of the error on held-out text to that on fitted text there was too little of the latter.
LARGEST_GAP = 1.15


@dataclass(frozen=True)
class Spread:
    """How a layer's error varies over sequences, at one pair of ranks: on text that was fitted on, and on held-out text.

    `fitting` and `held_out` hold one error a sequence.
    """

    rank_key: int
    rank_value: int
    fitting: tuple[float, ...]
    held_out: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Mean error on held-out text over that on the fitted text: far above 1 where there was too little of it."""
        return statistics.fmean(self.held_out) / max(statistics.fmean(self.fitting), 1e-12)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rank_key": self.rank_key,
            "rank_value": self.rank_value,
            "fitting": list(self.fitting),
            "held_out": list(self.held_out),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spread:
        return cls(data["rank_key"], data["rank_value"], tuple(data["fitting"]), tuple(data["held_out"]))


@dataclass(frozen=True)
class Candidate:
    """A form that a layer was fitted in to choose its sharing: its errors at shares of the layer's uncompressed bytes."""

    sharing: Sharing
    kept: tuple[float, ...]
    error: tuple[float, ...]

    @property
    def mean_error(self) -> float:
        """Geometric mean over the shares. Below 1e-6 an error is float32 rounding and counts as that."""
        return math.exp(statistics.fmean(math.log(max(error, 1e-6)) for error in self.error))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Candidate:
        return cls(data["sharing"], tuple(data["kept"]), tuple(data["error"]))


@dataclass(frozen=True)
class LayerProfile:
    """Bases of one layer at full rank and the error of its output over candidate ranks.

    Attributes:
        index: the layer.
        sharing: which of its heads share a basis.
        key, value: bases at full rank, float32, on the CPU.
        ranks_key, ranks_value: candidate ranks per group, ascending; the last is the full rank.
        error: float64 `[len(ranks_key), len(ranks_value)]`, `||Z - Z~||_F / ||Z||_F` on calibration blocks, measured.
        cosine: same shape, mean over tokens of the cosine of Z and Z~.
        sensitivity: mean KL divergence of the model's next-token distribution per squared error of this layer, measured with
            only this layer compressed; None until `orthokv.fit.sensitivity.sensitivities` has measured it.
        spectrum_key, spectrum_value: singular values `[groups, width]` where the method has them.
        spread: how the error varies over sequences; None where nothing was held out.
        candidates: what `sharing` was chosen from, as measured then; empty where it was given.
    """

    index: int
    sharing: Sharing
    key: Basis
    value: Basis
    ranks_key: tuple[int, ...]
    ranks_value: tuple[int, ...]
    error: Tensor
    cosine: Tensor
    sensitivity: float | None = None
    spectrum_key: Tensor | None = None
    spectrum_value: Tensor | None = None
    spread: Spread | None = None
    candidates: tuple[Candidate, ...] = ()

    def bases(self, rank_key: int, rank_value: int) -> Bases:
        return Bases(self.key.truncate(rank_key), self.value.truncate(rank_value))

    def tensors(self) -> dict[str, Tensor]:
        """Flat names for a safetensors file, prefixed with the layer."""
        found: dict[str, Tensor] = {"error": self.error, "cosine": self.cosine}
        for side, basis in (("key", self.key), ("value", self.value)):
            found[f"{side}.encoder"] = basis.encoder
            if not basis.orthonormal:
                found[f"{side}.decoder"] = basis.decoder
        for side, spectrum in (("key", self.spectrum_key), ("value", self.spectrum_value)):
            if spectrum is not None:
                found[f"{side}.spectrum"] = spectrum
        return {f"layers.{self.index}.{name}": tensor.contiguous() for name, tensor in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """The readable part: everything but the bases."""
        return {
            "index": self.index,
            "sharing": self.sharing,
            "ranks_key": list(self.ranks_key),
            "ranks_value": list(self.ranks_value),
            "groups_key": self.key.groups,
            "groups_value": self.value.groups,
            "error": self.error.tolist(),
            "cosine": self.cosine.tolist(),
            "sensitivity": self.sensitivity,
            "spread": None if self.spread is None else self.spread.to_dict(),
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    @classmethod
    def from_parts(cls, data: dict[str, Any], tensors: dict[str, Tensor], geometry: Geometry) -> LayerProfile:
        prefix = f"layers.{data['index']}."

        def basis(side: str) -> Basis:
            encoder = tensors[f"{prefix}{side}.encoder"]
            decoder = tensors.get(f"{prefix}{side}.decoder", encoder)
            return Basis(encoder, decoder, geometry.kv_heads, geometry.head_dim)

        error = tensors[prefix + "error"]
        if tuple(error.shape) != (len(data["ranks_key"]), len(data["ranks_value"])):
            raise ValueError(f"layer {data['index']} has ranks for another table of errors")
        if data["sharing"] not in SHARINGS:
            raise ValueError(f"layer {data['index']} has sharing {data['sharing']!r}")
        return cls(
            index=int(data["index"]),
            sharing=data["sharing"],
            key=basis("key"),
            value=basis("value"),
            ranks_key=tuple(data["ranks_key"]),
            ranks_value=tuple(data["ranks_value"]),
            error=error,
            cosine=tensors[prefix + "cosine"],
            sensitivity=data["sensitivity"],
            spectrum_key=tensors.get(prefix + "key.spectrum"),
            spectrum_value=tensors.get(prefix + "value.spectrum"),
            spread=None if data["spread"] is None else Spread.from_dict(data["spread"]),
            candidates=tuple(Candidate.from_dict(entry) for entry in data["candidates"]),
        )

    def save(self, path: Path, geometry: Geometry) -> None:
        """One layer as one file, which is what an interrupted fit leaves behind and resumes from."""
        # One key: the order of several would differ from process to process, and with it the file's bytes.
        described = {"layer": self.to_dict(), "geometry": geometry.to_dict()}
        save_file(self.tensors(), path, metadata={"orthokv": json.dumps(described)})

    @classmethod
    def load(cls, path: Path) -> LayerProfile:
        """Read a file written by `save`; raises `InvalidCheckpoint` for anything else."""
        tensors, metadata = read_safetensors(path)
        try:
            described = json.loads(metadata["orthokv"])
            geometry = Geometry.from_dict(described["geometry"])
            return cls.from_parts(described["layer"], tensors, geometry)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidCheckpoint(f"{path.name} is not a layer of a profile ({error})") from error


@dataclass(frozen=True)
class ErrorProfile:
    """Errors of all layers at every candidate rank, with what they were measured on: it serves every budget.

    `model`, `dataset` and `method` are written into every checkpoint made from the profile.

    Attributes:
        geometry: of the model.
        key_mode: keys were seen before (`pre`) or after (`post`) rotary embedding.
        sharing: what was asked for; under `auto` each layer has its own.
        layers: full-rank bases, errors and sensitivity of each layer.
        model: id, revision, digest and weight fingerprints.
        dataset: source, digest, number and length of the calibration blocks.
        method: name and settings of the fit.
        seed: of the fit.
    """

    geometry: Geometry
    key_mode: KeyMode
    sharing: SharingChoice
    layers: tuple[LayerProfile, ...]
    model: BaseModel
    dataset: Dataset
    method: Method
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": PROFILE_VERSION,
            "producer": producer(),
            "model": self.model,
            "geometry": self.geometry.to_dict(),
            "key_mode": self.key_mode,
            "sharing": self.sharing,
            "method": self.method,
            "dataset": self.dataset,
            "seed": self.seed,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def save(self, folder: Path) -> None:
        """Write `profile.json` and `profile.safetensors` into an existing folder."""
        tensors = {name: t for layer in self.layers for name, t in layer.tensors().items()}
        save_file(tensors, folder / PROFILE_TENSORS)
        described = {**self.to_dict(), "tensors_sha256": file_digest(folder / PROFILE_TENSORS)}
        (folder / PROFILE_JSON).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ErrorProfile:
        """Read a profile from a folder that holds one (a profile, or a checkpoint).

        Raises:
            InvalidCheckpoint: files are missing, truncated, altered, of another version, or disagree with each other.
        """
        if (folder / SUMS).is_file():
            verify_files(folder, [PROFILE_JSON, PROFILE_TENSORS])
        data = read_json(folder / PROFILE_JSON)
        if data.get("format_version") != PROFILE_VERSION:
            raise InvalidCheckpoint(
                f"profile format version {data.get('format_version')!r} is not {PROFILE_VERSION}"
            )
        tensors, _ = read_safetensors(folder / PROFILE_TENSORS)
        if data.get("tensors_sha256") != file_digest(folder / PROFILE_TENSORS):
            raise InvalidCheckpoint(
                f"{PROFILE_TENSORS} was altered: its sha256 is not the one in {PROFILE_JSON}"
            )
        for name, allowed in (("key_mode", KEY_MODES), ("sharing", SHARING_CHOICES)):
            if data.get(name) not in allowed:
                raise InvalidCheckpoint(
                    f"{PROFILE_JSON}: {name} {data.get(name)!r} is not one of {', '.join(allowed)}"
                )
        try:
            data = upgrade_profile(data)
            geometry = Geometry.from_dict(data["geometry"])
            layers = tuple(LayerProfile.from_parts(entry, tensors, geometry) for entry in data["layers"])
            profile = cls(
                geometry=geometry,
                key_mode=data["key_mode"],
                sharing=data["sharing"],
                layers=layers,
                model=data["model"],
                dataset=data["dataset"],
                method=data["method"],
                seed=int(data["seed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidCheckpoint(
                f"{PROFILE_JSON} and {PROFILE_TENSORS} do not fit together ({error})"
            ) from error
        if [layer.index for layer in layers] != list(range(geometry.layers)):
            raise InvalidCheckpoint(f"the profile has {len(layers)} layers, its model {geometry.layers}")
        return profile

    @property
    def warnings(self) -> list[str]:
        """What a reader of this profile should know, in sentences."""
        gaps = [layer.spread.gap for layer in self.layers if layer.spread is not None]
        if not gaps or (gap := statistics.median(gaps)) <= LARGEST_GAP:
            return []
        return [
            f"too little calibration text: layer errors are {gap:.2f} times as large on held-out text as on the "
            f"{self.dataset['num_samples'] - self.dataset['held_out']} samples that were fitted on; give more samples"
        ]

    def with_sensitivities(self, sensitivities: list[float]) -> ErrorProfile:
        layers = tuple(
            replace(layer, sensitivity=s) for layer, s in zip(self.layers, sensitivities, strict=True)
        )
        return replace(self, layers=layers)
