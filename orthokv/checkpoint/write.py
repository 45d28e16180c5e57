"""The checkpoint format, version 1: write, read, verify.

An *adapter* is `orthokv.json`, `orthokv.safetensors`, the profile, a model card and `SHA256SUMS`. A *full* checkpoint
adds the base model's own files, unchanged but for `config.json`, whose `quantization_config` makes
`AutoModelForCausalLM.from_pretrained` attach the bases. Nothing but JSON, safetensors and text is ever written or read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from orthokv.bases.basis import Bases, Basis
from orthokv.checkpoint.card import model_card
from orthokv.checkpoint.read import Checkpoint, read_checkpoint
from orthokv.files.digests import SUMS, read_sums, sums_of
from orthokv.files.folders import new_folder, swap_files
from orthokv.files.reading import read_json
from orthokv.models.source import ModelSource
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.measure import live_bytes_per_token
from orthokv.spec.errors import CheckpointMismatch, InvalidSetting, StorageError
from orthokv.spec.geometry import Geometry
from orthokv.spec.names import CARD, CONFIG, FORMAT_VERSION, QUANT_METHOD, TENSORS
from orthokv.spec.records import CheckpointRecord, LayerRanks, SideRank
from orthokv.spec.version import producer
from orthokv.spec.vocabulary import FORMS, Form, Sharing


def write_checkpoint(
    profile: ErrorProfile,
    plan: Plan,
    out: Path,
    *,
    form: Form = "adapter",
    base: ModelSource | None = None,
    polished: ErrorProfile | None = None,
) -> Checkpoint:
    """Write a checkpoint into a new folder and return it as read back.

    Args:
        polished: the profile with bases made better at this plan's ranks (`orthokv.fit.polish.polish`), which the
            checkpoint gets; None: those of the profile. The profile in the checkpoint is always the one that serves every
            budget.
        base: the base model's files; needed for `form="full"`. Where given, it must be the profile's.

    Raises:
        InvalidSetting: unknown form, `out` is taken, or the base model is missing for a full checkpoint.
        CheckpointMismatch: `base` is not the model that the profile was made from.
        StorageError: the disk is full or read-only; nothing is left behind.
    """
    if form not in FORMS:
        raise InvalidSetting(f"form must be one of {', '.join(FORMS)}, not {form!r}")
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
        config = _config(fitted, plan, bases, form=form)
        write_described(folder, config)
        read_checkpoint(folder)
    return read_checkpoint(out)


def _tensors(bases: list[Bases]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(bases):
        for side, basis in (("key", layer.key), ("value", layer.value)):
            found[f"layers.{i}.{side}.encoder"] = basis.encoder.contiguous()
            if not basis.orthonormal:
                found[f"layers.{i}.{side}.decoder"] = basis.decoder.contiguous()
    return found


def _config(profile: ErrorProfile, plan: Plan, bases: list[Bases], *, form: Form) -> CheckpointRecord:
    geometry = profile.geometry
    (codec,) = {side.codec for layer in plan.layers for side in (layer.key, layer.value)}
    measured_bytes = live_bytes_per_token(geometry, bases, profile.key_mode, codec)
    return {
        "format_version": FORMAT_VERSION,
        "producer": producer(),
        "form": form,
        "base_model": profile.model,
        "geometry": geometry.to_dict(),
        "key_mode": profile.key_mode,
        "sharing": profile.sharing,
        "codec": {"name": codec.name},
        "ranks": [
            _ranks(layer.sharing, pair, geometry) for layer, pair in zip(profile.layers, bases, strict=True)
        ],
        "cache": {
            "bytes_per_token": measured_bytes,
            "bytes_per_token_dense": plan.dense_bytes_per_token,
            "kept": measured_bytes / plan.dense_bytes_per_token,
            "number_bytes": codec.bits // 8,
        },
        "calibrated_positions": profile.dataset["positions"],
        "dataset": profile.dataset,
        "method": profile.method,
        "seed": profile.seed,
        "plan": plan.to_dict(),
        "measured": None,
    }


def _ranks(sharing: Sharing, layer: Bases, geometry: Geometry) -> LayerRanks:
    def side(basis: Basis) -> SideRank:
        total = basis.latents_per_token
        return {"rank": basis.rank, "total": total, "per_head": total / geometry.kv_heads}

    return {"sharing": sharing, "key": side(layer.key), "value": side(layer.value)}


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


def write_described(folder: Path, config: CheckpointRecord) -> None:
    """Write `orthokv.json` and everything that follows from it: the model card and the digests."""
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(config), encoding="utf-8")
    (folder / SUMS).write_text(sums_of(folder), encoding="utf-8")


def record_measurements(folder: Path, measured: dict[str, Any]) -> None:
    """Put measured quality into a checkpoint: `orthokv.json`, the model card and the digests follow.

    Raises:
        StorageError: the disk is full or read-only; the checkpoint is as it was.
    """
    config: CheckpointRecord = {**read_checkpoint(folder).config, "measured": measured}
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
            swap_files(written, folder, (CARD, CONFIG, SUMS))
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}; it is as it was") from error


# ---------------------------------------------------------------------------------------------------- read
