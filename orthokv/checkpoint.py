"""The checkpoint format, version 1: write, read, verify.

An *adapter* is ``orthokv.json``, ``orthokv.safetensors``, the profile, a model card and ``SHA256SUMS``. A *full* checkpoint
adds the base model's own files, unchanged but for ``config.json``, whose ``quantization_config`` makes
``AutoModelForCausalLM.from_pretrained`` attach the bases. Nothing but JSON, safetensors and text is ever written or read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from orthokv.allocate import LATENT_BYTES, Plan, position_bytes
from orthokv.attention import Bases
from orthokv.basis import (
    KEY_MODES,
    SHARING_CHOICES,
    SHARINGS,
    Basis,
    KeyMode,
    Sharing,
    SharingChoice,
    group_width,
    orthonormality_error,
)
from orthokv.codecs import CODECS, DEFAULT_CODEC
from orthokv.digests import SUMS, read_sums, sums_of, verify_files
from orthokv.errors import CheckpointMismatch, InvalidCheckpoint, InvalidSetting, StorageError
from orthokv.fingerprint import DTYPES
from orthokv.geometry import AttentionGeometry, held_tokens
from orthokv.naming import CARD, CONFIG, FORMAT_VERSION, QUANT_METHOD, TENSORS
from orthokv.profile import ErrorProfile, read_json, read_safetensors
from orthokv.source import ModelSource

FORMS = ("adapter", "full")
Form = Literal["adapter", "full"]
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
    """A verified checkpoint in memory. ``config`` is ``orthokv.json``; ``bases`` one pair a layer, float32, on the CPU."""

    folder: Path
    config: dict[str, Any]
    geometry: AttentionGeometry
    key_mode: KeyMode
    sharing: SharingChoice
    codec: str
    bases: tuple[Bases, ...]

    def declared_bytes(self, *, sequences: int, tokens: int, number_bytes: int = 2) -> int:
        """Bytes that a cache of ``sequences x tokens`` holds, with ``number_bytes`` a latent."""
        latents = sum(
            basis.latents_per_token * held_tokens(self.geometry.window(index), tokens)
            for index, layer in enumerate(self.bases)
            for basis in (layer.key, layer.value)
            if basis is not None
        )
        positions = position_bytes(self.geometry, self.key_mode, tokens)
        return sequences * (latents * number_bytes + positions)


# --------------------------------------------------------------------------------------------------- write


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: written beside ``out`` and renamed at the end.

    Raises:
        InvalidSetting: ``out`` exists and is not an empty folder.
        StorageError: writing failed, a full disk for example; everything written is removed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidSetting(f"{out} exists and is not an empty folder")
    out = out.resolve()
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        _remove_empty(missing)
        raise StorageError(f"cannot write {out}: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(missing)
        if is_storage_failure(error):
            raise StorageError(f"cannot write {out}: {error}; nothing was left behind") from error
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders made on the way, innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception means that a disk is full, read-only or over quota (safetensors wraps the OSError in text)."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
    return type(error).__name__ == "SafetensorError" and (
        "os error" in str(error) or "I/O error" in str(error)
    )


def write_checkpoint(
    profile: ErrorProfile,
    plan: Plan,
    out: Path,
    *,
    form: Form = "adapter",
    base: ModelSource | None = None,
    codec: str = DEFAULT_CODEC,
    polished: ErrorProfile | None = None,
) -> Checkpoint:
    """Write a checkpoint into a new folder and return it as read back.

    Args:
        polished: the profile with bases made better at this plan's ranks (:func:`orthokv.polish.polish`), which the
            checkpoint gets; None: those of the profile. The profile in the checkpoint is always the one that serves every
            budget.
        base: the base model's files; needed for ``form="full"``. Where given, it must be the profile's.

    Raises:
        InvalidSetting: unknown form or codec, ``out`` is taken, or the base model is missing for a full checkpoint.
        CheckpointMismatch: ``base`` is not the model that the profile was made from.
        StorageError: the disk is full or read-only; nothing is left behind.
    """
    if form not in FORMS:
        raise InvalidSetting(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if codec not in CODECS:
        raise InvalidSetting(f"codec must be one of {', '.join(CODECS)}, not {codec!r}")
    if form == "full" and base is None:
        raise InvalidSetting("a full checkpoint needs the base model's files")
    if base is not None and base.digest != profile.model["digest"]:
        raise CheckpointMismatch(
            f"the profile was made from another model than {base.id} (their digests differ)"
        )
    fitted = profile if polished is None else polished
    bases = [layer.bases(*ranks) for layer, ranks in zip(fitted.layers, plan.ranks, strict=True)]
    with new_folder(out) as folder:
        if form == "full":
            assert base is not None
            _copy_base(base, folder, profile)
        save_file(_tensors(bases), folder / TENSORS)
        profile.save(folder)
        config = _config(fitted, plan, bases, form=form, codec=codec)
        write_described(folder, config)
        read_checkpoint(folder)
    return read_checkpoint(out)


def _tensors(bases: list[Bases]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(bases):
        for side, basis in (("key", layer.key), ("value", layer.value)):
            assert basis is not None
            found[f"layers.{i}.{side}.encoder"] = basis.encoder.contiguous()
            if not basis.orthonormal:
                found[f"layers.{i}.{side}.decoder"] = basis.decoder.contiguous()
    return found


def _config(
    profile: ErrorProfile, plan: Plan, bases: list[Bases], *, form: str, codec: str
) -> dict[str, Any]:
    # Imported here: measuring builds a live cache, and the runtime reads checkpoints.
    from orthokv.runtime.measure import live_bytes_per_token

    geometry = profile.geometry
    measured_bytes = live_bytes_per_token(geometry, bases, profile.key_mode)
    return {
        "format_version": FORMAT_VERSION,
        "producer": profile.to_dict()["producer"],
        "form": form,
        "base_model": profile.model,
        "geometry": geometry.to_dict(),
        "key_mode": profile.key_mode,
        "sharing": profile.sharing,
        "codec": {"name": codec},
        "ranks": [
            {"sharing": layer.sharing, **_ranks(pair, geometry)}
            for layer, pair in zip(profile.layers, bases, strict=True)
        ],
        "cache": {
            "bytes_per_token": measured_bytes,
            "bytes_per_token_dense": geometry.dense_bytes_per_token,
            "kept": measured_bytes / geometry.dense_bytes_per_token,
            "number_bytes": LATENT_BYTES,
        },
        # A profile of before blocks could begin elsewhere has none: they began at 0.
        "calibrated_positions": profile.dataset.get("positions", profile.dataset["sequence_length"]),
        "dataset": profile.dataset,
        "method": profile.method,
        "seed": profile.seed,
        "plan": plan.to_dict(),
        "measured": None,
    }


def _ranks(layer: Bases, geometry: AttentionGeometry) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side, basis in (("key", layer.key), ("value", layer.value)):
        assert basis is not None
        total = basis.latents_per_token
        found[side] = {"rank": basis.rank, "total": total, "per_head": total / geometry.kv_heads}
    return found


def _copy_base(base: ModelSource, folder: Path, profile: ErrorProfile) -> None:
    # A chat template belongs to the model; it is copied, never rendered.
    templates = [name for name in ("chat_template.jinja",) if (base.folder / name).is_file()]
    for name in (*base.files, *templates):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.folder / name, target)
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise InvalidSetting(
            "the base model is quantised already: only the adapter form can be attached to it"
        )
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "key_mode": profile.key_mode,
        "sharing": profile.sharing,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_described(folder: Path, config: dict[str, Any]) -> None:
    """Write ``orthokv.json`` and everything that follows from it: the model card and the digests."""
    from orthokv.report import model_card

    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(config), encoding="utf-8")
    (folder / SUMS).write_text(sums_of(folder), encoding="utf-8")


def record_measurements(folder: Path, measured: dict[str, Any]) -> None:
    """Put measured quality into a checkpoint: ``orthokv.json``, the model card and the digests follow.

    Raises:
        StorageError: the disk is full or read-only; the checkpoint is as it was.
    """
    config = {**read_checkpoint(folder).config, "measured": measured}
    # As they stand: hashing them again would read a whole base model, and sign what was altered meanwhile.
    untouched = [
        f"{digest}  {name}" for name, digest in read_sums(folder).items() if name not in (CONFIG, CARD)
    ]
    try:
        with tempfile.TemporaryDirectory(prefix=".measured.", dir=folder.parent) as name:
            written = Path(name)
            write_described(written, config)
            lines = [*untouched, *(written / SUMS).read_text(encoding="utf-8").splitlines()]
            lines.sort(key=lambda line: line.split("  ", 1)[1])
            (written / SUMS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            _swap(written, folder, (CARD, CONFIG, SUMS))
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}; it is as it was") from error


def _swap(written: Path, folder: Path, names: Sequence[str]) -> None:
    """Put files in the place of others of the same names: all of them, or where one cannot be moved none."""
    for name in names:
        os.link(folder / name, written / f"old-{name}")  # takes no room on a disk that is full
    moved: list[str] = []
    try:
        for name in names:
            os.replace(written / name, folder / name)
            moved.append(name)
    except OSError:
        for name in moved:
            os.replace(written / f"old-{name}", folder / name)
        raise


# ---------------------------------------------------------------------------------------------------- read


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint: digests, version, shapes, finiteness and orthonormality.

    Raises:
        InvalidCheckpoint: anything is missing or does not hold; names the file, tensor or field.
    """
    if not folder.is_dir():
        raise InvalidCheckpoint(f"{folder} is not a folder")
    verify_files(folder, [CONFIG, TENSORS])
    config = read_json(folder / CONFIG)
    if config.get("format_version") != FORMAT_VERSION:
        raise InvalidCheckpoint(
            f"checkpoint format version {config.get('format_version')!r} is not {FORMAT_VERSION}"
        )
    tensors, _ = read_safetensors(folder / TENSORS)
    try:
        geometry = AttentionGeometry.from_dict(config["geometry"])
        key_mode, sharing, codec = config["key_mode"], config["sharing"], config["codec"]["name"]
        ranks = [(int(entry["key"]["rank"]), int(entry["value"]["rank"])) for entry in config["ranks"]]
        # Checkpoints from before layers could differ name the sharing once.
        sharings = [entry.get("sharing", sharing) for entry in config["ranks"]]
        _require(config)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{CONFIG} lacks a field or holds a wrong one ({error!r})") from error
    for name, value, allowed in (
        ("key_mode", key_mode, KEY_MODES),
        ("sharing", sharing, SHARING_CHOICES),
        *(("sharing of a layer", found, SHARINGS if sharing == "auto" else (sharing,)) for found in sharings),
        ("codec", codec, tuple(CODECS)),
    ):
        if value not in allowed:
            raise InvalidCheckpoint(f"{CONFIG}: {name} {value!r} is not one of {', '.join(allowed)}")
    if len(ranks) != geometry.layers:
        raise InvalidCheckpoint(
            f"{CONFIG} has ranks for {len(ranks)} layers, its model has {geometry.layers}"
        )
    bases = tuple(
        _read_layer(tensors, i, pair, found, geometry)
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
    for dtype in DTYPES:
        if not isinstance(config["base_model"]["fingerprints"][dtype], str):
            raise TypeError(f"base_model.fingerprints.{dtype}")


def _read_layer(
    tensors: dict[str, Tensor],
    layer: int,
    ranks: tuple[int, int],
    sharing: Sharing,
    geometry: AttentionGeometry,
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
