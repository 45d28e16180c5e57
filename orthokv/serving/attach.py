"""Putting a checkpoint on a loaded model, and taking it off again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthokv.bases.basis import Bases, Basis
from orthokv.checkpoint.read import Checkpoint, read_checkpoint
from orthokv.files.digests import SUMS
from orthokv.models.fingerprint import matches
from orthokv.models.geometry import attention_modules, geometry_of
from orthokv.runtime.seam import Seam, seam_of
from orthokv.spec.codec import check_codec
from orthokv.spec.errors import CheckpointMismatch, InvalidCheckpoint, InvalidSetting
from orthokv.spec.hub_ids import is_repository
from orthokv.spec.names import CONFIG, QUANT_METHOD, TENSORS

log = logging.getLogger("orthokv")

_SUBMODULE = "orthokv_bases"


class AttachedBases(nn.Module):
    """Bases of one layer as buffers: they follow the model to its device and stay out of its state dict."""

    key_encoder: Tensor
    key_decoder: Tensor
    value_encoder: Tensor
    value_decoder: Tensor

    def __init__(self, bases: Bases, dtype: torch.dtype, codecs: tuple[str, str]) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = bases.key.kv_heads, bases.key.head_dim
        self.codecs, self.identity = codecs, bases.identity
        self._orthonormal = {"key": bases.key.orthonormal, "value": bases.value.orthonormal}
        for side, basis in (("key", bases.key), ("value", bases.value)):
            self.register_buffer(f"{side}_encoder", basis.encoder.to(dtype), persistent=False)
            if not basis.orthonormal:
                self.register_buffer(f"{side}_decoder", basis.decoder.to(dtype), persistent=False)

    def _basis(self, side: str) -> Basis:
        encoder = cast(Tensor, getattr(self, f"{side}_encoder"))
        decoder = encoder if self._orthonormal[side] else cast(Tensor, getattr(self, f"{side}_decoder"))
        return Basis(encoder, decoder, self.kv_heads, self.head_dim)

    @property
    def key(self) -> Basis:
        return self._basis("key")

    @property
    def value(self) -> Basis:
        return self._basis("value")


def attach(
    model: PreTrainedModel, checkpoint: str | Path | Checkpoint, *, codec: str | None = None
) -> PreTrainedModel:
    """Make a loaded model keep its cache in a checkpoint's latent space. The model is changed in place and returned.

    Args:
        model: loaded with `sdpa` or `eager` attention; weights may be quantised.
        checkpoint: a folder, a hub id, or a checkpoint already read.
        codec: how latents are stored, instead of what the checkpoint says: `16-bit` or `native`.

    Returns:
        The same model.

    Raises:
        InvalidCheckpoint: the checkpoint is truncated, altered or of another version.
        CheckpointMismatch: it belongs to another model, geometry or rotary embedding.
        InvalidSetting: the model is attached already.
    """
    found = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(locate(checkpoint))
    check_model(model, found)
    dtype = model.dtype
    name = check_codec(codec or found.codec)
    # Everything that can fail comes before the first change to the model.
    attached = [
        AttachedBases(bases, dtype, (name, name)).to(next(module.parameters()).device)
        for module, bases in zip(attention_modules(model), found.bases, strict=True)
    ]
    seam = Seam(model, found.key_mode)
    for index, (module, layer) in enumerate(zip(seam.modules, attached, strict=True)):
        module.add_module(_SUBMODULE, layer)
        seam.set_bases(index, layer)
    log.info(
        "OrthoKV is active: the cache takes %d bytes a token (%.1f %% of %d at 16 bits)",
        found.config["cache"]["bytes_per_token"],
        100 * found.config["cache"]["kept"],
        found.config["cache"]["bytes_per_token_dense"],
    )
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`: the model is as it was before.

    Raises:
        InvalidSetting: nothing is attached.
    """
    seam = seam_of(model)
    if seam is None:
        raise InvalidSetting("nothing is attached to this model")
    seam.remove()
    for module in seam.modules:
        delattr(module, _SUBMODULE)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == QUANT_METHOD:
        # Loaded as a full checkpoint: without its bases it is the plain model, also when it is saved.
        quantizer.remove_quantization_config(model)
    return model


def check_model(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a model that the checkpoint was not made for."""
    geometry, wanted = geometry_of(model.config), checkpoint.geometry
    if geometry.rope_hash != wanted.rope_hash:
        raise CheckpointMismatch(
            f"the checkpoint was fitted under rotary parameters {wanted.rope}, the model has {geometry.rope}"
        )
    for name, value in geometry.to_dict().items():
        # A longer context than at calibration is a matter of quality, not of correctness. Checkpoints made before windows
        # were recorded have none.
        if name == "windows" and wanted.windows is None:
            continue
        if name != "max_positions" and value != getattr(wanted, name):
            raise CheckpointMismatch(
                f"the checkpoint is for {name} {getattr(wanted, name)!r}, the model has {value!r}"
            )
    same = matches(model, checkpoint.config["base_model"]["fingerprints"])
    if same is None:
        log.warning(
            "the model's projections are quantised: its weights cannot be compared with the checkpoint's base"
        )
    elif not same:
        raise CheckpointMismatch(
            f"the checkpoint belongs to other weights (base model {checkpoint.config['base_model']['id']})"
        )


def locate(
    checkpoint: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A local folder as it is; a hub id as the folder its adapter files were downloaded to.

    Raises:
        InvalidCheckpoint: it is neither, or cannot be fetched.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path
    text = str(checkpoint)
    if not is_repository(text):
        raise InvalidCheckpoint(f"{text} is neither a folder nor a hub id")
    try:
        wanted = [CONFIG, TENSORS, SUMS]
        return Path(snapshot_download(text, revision=revision, cache_dir=cache_dir, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        raise InvalidCheckpoint(f"checkpoint {text} cannot be fetched from the hub ({error})") from error
