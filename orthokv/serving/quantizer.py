"""`AutoModelForCausalLM.from_pretrained` for full checkpoints, after `import orthokv`.

The weights are those of the base model and load as usual; the bases sit in a side file that plain engines ignore, so a
program without this import gets the uncompressed model, with a warning from `transformers`.

This module is imported while `transformers` itself is being imported, by whichever of its parts comes first: so it takes
from there only what is loaded by then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from orthokv.spec.errors import InvalidCheckpoint, InvalidSetting
from orthokv.spec.names import CONFIG, FORMAT_VERSION, QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class OrthoKVConfig(QuantizationConfigMixin):
    """The `quantization_config` block of a full checkpoint; all numbers live in `orthokv.json` beside it."""

    def __init__(
        self, format_version: int = FORMAT_VERSION, key_mode: str = "", sharing: str = "", **_: Any
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise InvalidCheckpoint(f"checkpoint format version {format_version!r} is not {FORMAT_VERSION}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # a name of ours, beside the built-in enumeration
        self.format_version, self.key_mode, self.sharing = format_version, key_mode, sharing


@register_quantizer(QUANT_METHOD)
class OrthoKVQuantizer(HfQuantizer):
    """Attaches the bases once the weights are in place: so `AutoModelForCausalLM.from_pretrained` loads a full checkpoint."""

    requires_calibration = (
        True  # bases come with the checkpoint; a plain model cannot be quantised on the fly
    )
    _folder: Path | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if checkpoint_files:
            self._folder = Path(checkpoint_files[0]).parent
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from orthokv.serving.attach import attach, locate

        folder = self._folder
        if folder is None:
            raise InvalidCheckpoint("the model was loaded from no folder: its bases cannot be found")
        if not (folder / CONFIG).is_file():
            # From a hub only the weights were downloaded so far; the bases are those of the same commit.
            if folder.parent.name != "snapshots":
                raise InvalidCheckpoint(f"{CONFIG} is missing from {folder}")
            folder = locate(model.config._name_or_path, revision=folder.name, cache_dir=folder.parents[2])
        return attach(model, folder)

    def is_serializable(self) -> bool:
        # Asked only by `save_pretrained`, which would write the base model's weights and leave the bases behind.
        raise InvalidSetting(
            "a model with bases attached cannot be saved: copy its checkpoint folder, or detach first"
        )

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
