"""Models larger than the memory: weights stay in their safetensors files, and one decoder layer at a time is loaded.

What lies outside the decoder layers (embeddings, last norm, output head) is loaded once and stays. A layer's weights are
read when its forward is called and stay until another layer's is, so fitting a layer for a thousand steps reads it once.
Everything else sees an ordinary model. The reading is done by `transformers`' own loader, which renames, fuses and converts
tensors exactly as `from_pretrained` does; only what it is given at a time is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.modeling_utils import LoadStateDictConfig

from orthokv.compat import drop_expected_keys, dtype_plan, finish_loading
from orthokv.models.geometry import decoder_layers
from orthokv.models.memory import GIB, available_bytes
from orthokv.models.source import (
    ModelSource,
    check_finite,
    check_weights,
    first_line,
    load_config,
    quiet_transformers,
    resolve_device,
)
from orthokv.spec.errors import InvalidModel, InvalidSetting

Streaming = Literal["auto", "on", "off"]
# `auto` streams a model whose weights would take more than this share of the free memory: the rest is for activations.
LARGEST_SHARE = 0.6

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, known by the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Size in memory; `dtype` None keeps the stored one."""
        loaded = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype
        return torch.Size(self.shape).numel() * loaded.itemsize


def stored_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    """Every tensor of a model by the name it has in the files; no weight is read.

    Raises:
        InvalidModel: a tensor's dtype is not a plain number.
    """
    found: dict[str, StoredTensor] = {}
    for name in source.files:
        if not name.endswith(".safetensors"):
            continue
        path = source.folder / name
        with safe_open(path, framework="pt", backend="pread") as file:
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                if entry.get_dtype() not in _DTYPES:
                    raise InvalidModel(f"{key} of model {source.id} is stored as {entry.get_dtype()}")
                found[key] = StoredTensor(path, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
    return found


def streaming_reason(
    source: ModelSource, device: torch.device, dtype: torch.dtype | None, streaming: Streaming = "auto"
) -> str | None:
    """Why a model is to be streamed, as one sentence; None where it is loaded whole.

    Raises:
        InvalidSetting: `streaming` is none of its values.
    """
    if streaming not in get_args(Streaming):
        raise InvalidSetting(f"streaming must be one of {', '.join(get_args(Streaming))}, not {streaming!r}")
    if streaming == "off":
        return None
    needed = sum(tensor.bytes_as(dtype) for tensor in stored_tensors(source).values())
    # A whole model is loaded on the host first.
    free, where = min((available_bytes(place), str(place)) for place in {device, torch.device("cpu")})
    if streaming == "auto" and needed <= LARGEST_SHARE * free:
        return None
    return (
        f"{source.id} is streamed from disk, one decoder layer at a time: its weights take {needed / GIB:.1f} GiB, "
        f"{free / GIB:.1f} GiB are free on {where}"
    )


class StreamedWeights:
    """The weights of a model's decoder layers, one layer of which is loaded at a time.

    The parameters of all others are placeholders: of the right shape, dtype and device, of one element in memory, and NaN,
    so that using one by mistake shows at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        files: dict[str, Path],
        targets: dict[str, str],
        config: LoadStateDictConfig,
    ) -> None:
        self.model, self.source = model, source
        self._files, self._config = files, config
        self._layers = decoder_layers(model)
        names = {id(module): name for name, module in model.named_modules()}
        self.prefixes = tuple(f"{names[id(layer)]}." for layer in self._layers)
        self._targets = targets
        self._sound: set[int] = set()
        self.present: int | None = None

    def install(self) -> None:
        """Drop all layers, and load each when its forward is called."""
        device = torch.device(cast(dict[str, Any], self._config.device_map)[""])
        self._absent = [_placeholders(layer, device) for layer in self._layers]
        for index, layer in enumerate(self._layers):
            self._drop(index)
            layer.forward = self._loading(index, layer.forward)
        object.__setattr__(self.model, "_orthokv_weights", self)

    def _loading(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def loaded(*args: Any, **kwargs: Any) -> Any:
            self.require(index)
            return forward(*args, **kwargs)

        return loaded

    def require(self, index: int) -> None:
        """Have a layer loaded, and no other.

        Raises:
            InvalidModel: a weight of it is not finite, or the file cannot be read any more.
        """
        if self.present == index:
            return
        if self.present is not None:
            self._drop(self.present)
            self.present = None
        self.read(self.prefixes[index])
        self._layers[index].requires_grad_(False)
        if index not in self._sound:
            layer = self._layers[index]
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                check_finite(self.source, self.prefixes[index] + name, tensor)
            self._sound.add(index)
        self.present = index

    @contextmanager
    def module(self, module: nn.Module) -> Iterator[None]:
        """Have one module of some decoder layer loaded inside the block, without reading the rest of that layer."""
        name = next(name for name, found in self.model.named_modules() if found is module) + "."
        index = next(i for i, prefix in enumerate(self.prefixes) if name.startswith(prefix))
        if self.present == index:
            yield
            return
        self.read(name)
        try:
            yield
        finally:
            self._drop(index)

    def read(self, *prefixes: str) -> None:
        """Load every weight of the model whose name begins with one of `prefixes`."""
        keys = [key for key, target in self._targets.items() if target.startswith(prefixes)]
        with ExitStack() as stack:
            # Not mapped: the map of a file larger than the memory is refused, and its pages count as this process's.
            try:
                opened = {
                    path: stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                    for path in {self._files[key] for key in keys}
                }
                slices = {key: opened[self._files[key]].get_slice(key) for key in keys}
                with quiet_transformers():
                    convert_and_load_state_dict_in_model(self.model, slices, self._config)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                raise InvalidModel(
                    f"weights of {self.source.id} cannot be read: {first_line(error)}"
                ) from error

    def read_outside(self) -> None:
        """Load every weight that belongs to no decoder layer."""
        targets = self._targets.values()
        self.read(*(target for target in targets if not target.startswith(self.prefixes)))

    def _drop(self, index: int) -> None:
        for module, name, placeholder in self._absent[index]:
            setattr(module, name, placeholder)


def streamed_weights(model: PreTrainedModel) -> StreamedWeights | None:
    """What streams a model's weights; None for a model that was loaded whole."""
    return getattr(model, "_orthokv_weights", None)


@contextmanager
def weights_present(model: PreTrainedModel, module: nn.Module) -> Iterator[None]:
    """Weights of a module inside a decoder layer can be read in the block, be the model whole or streamed."""
    weights = streamed_weights(model)
    if weights is None:
        yield
    else:
        with weights.module(module):
            yield


def _placeholders(layer: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, Tensor]]:
    """A stand-in for every weight of a layer: module, attribute, tensor."""
    found: list[tuple[nn.Module, str, Tensor]] = []
    stored = set(layer.state_dict())  # without the buffers that no file holds
    for path, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if path not in stored:
            continue
        owner, _, name = path.rpartition(".")
        value = float("nan") if tensor.is_floating_point() else 0
        empty = torch.full((), value, dtype=tensor.dtype, device=device).expand(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=False)
        found.append((layer.get_submodule(owner), name, empty))
    return found


def stream_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of `orthokv.models.source.load_model`, with its decoder layers left on disk until they are called.

    Raises:
        UnsupportedModel, InvalidModel, InvalidSetting: as `orthokv.models.source.load_model` would; a weight that is not
            finite is found when its layer is first loaded.
    """
    target, stored = resolve_device(device), stored_tensors(source)
    settings = load_config(source)
    dtype = dtype or settings.dtype or _first_float(stored)
    with quiet_transformers():
        try:
            with torch.device("meta"), no_init_weights(), no_tie_weights():
                build: Any = AutoModelForCausalLM.from_config
                model = cast(
                    PreTrainedModel, build(settings, dtype=dtype, attn_implementation=attn_implementation)
                )
        except Exception as error:
            raise InvalidModel(f"model {source.id} cannot be built: {first_line(error)}") from error
        config = LoadStateDictConfig(
            ignore_mismatched_sizes=True,  # reported in `info` instead, and refused below
            device_map={"": target},
            dtype=dtype,
            dtype_plan=dtype_plan(model, dtype),
            weight_mapping=cast(Any, get_model_conversion_mapping(model)),
        )
        targets = _targets(model, stored, config)
        # A load of tensors without data: every name, shape and conversion is checked before any weight is read.
        headers = {
            key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for key, tensor in stored.items()
        }
        info, _ = convert_and_load_state_dict_in_model(
            model, headers, replace(config, device_map={"": torch.device("meta")})
        )
        _check_info(source, model, info)
        weights = StreamedWeights(
            model, source, {key: tensor.file for key, tensor in stored.items()}, targets, config
        )
        weights.read_outside()
        finish_loading(model, config, info)
    check_weights(source, info.to_dict())
    weights.install()
    model = cast(PreTrainedModel, model.eval().requires_grad_(False))
    model.config._name_or_path = model.name_or_path = source.id
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(weights.prefixes):
            check_finite(source, name, tensor)
    return model


def _targets(
    model: PreTrainedModel, stored: dict[str, StoredTensor], config: LoadStateDictConfig
) -> dict[str, str]:
    """The model's name of each stored tensor (the first of them, where one tensor becomes several)."""
    mapping: Sequence[Any] = config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, str] = {}
    for key in stored:
        target, _ = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:
            target, _ = rename_source_key(key, [], [], prefix, names)
        if target in names:  # others were reported as unexpected
            found[key] = target
    return found


def _check_info(source: ModelSource, model: PreTrainedModel, info: Any) -> None:
    info = deepcopy(info)
    drop_expected_keys(model, info)
    info.missing_keys -= model.all_tied_weights_keys.keys()
    faults = [*info.error_msgs, *(first_line(Exception(text)) for text in info.conversion_errors.values())]
    check_weights(source, {**info.to_dict(), "error_msgs": faults})


def _first_float(stored: dict[str, StoredTensor]) -> torch.dtype:
    return next((t.dtype for t in stored.values() if t.dtype.is_floating_point), torch.float32)
