"""A model that the caller has loaded: the files that it came from, and how a fit borrows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from orthokv.models.fingerprint import matches, weight_fingerprints
from orthokv.models.source import ModelSource, resolve_model
from orthokv.models.streaming import stream_model, streamed_weights
from orthokv.spec.errors import InvalidSetting


def source_of(model: PreTrainedModel, revision: str | None = None) -> ModelSource:
    """The files that a loaded model came from: its tokenizer, its digest, and what a full checkpoint copies.

    They are found by the name that `from_pretrained` noted, and must hold the same key and value weights: one layer at a time
    is read from disk to see that.

    Args:
        revision: of a hub model; None: the commit that it was loaded at.

    Raises:
        InvalidSetting: the model was not loaded from files, is spread over several devices, has quantised weights, or has
            other weights than its files.
        OrthoKVError: the files cannot be found or are not sound; see `orthokv.models.source.resolve_model`.
    """
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise InvalidSetting(
            f"the model is spread over {', '.join(sorted(places))}: load it on one device, or give its id or folder"
        )
    name = str(model.config._name_or_path or "")
    if not name:
        raise InvalidSetting(
            "the model was not loaded from files, which hold its tokenizer: save both and give the folder"
        )
    if revision is None and not Path(name).expanduser().is_dir():
        revision = getattr(model.config, "_commit_hash", None)
    source = resolve_model(name, revision=revision)
    if streamed_weights(model) is not None:
        return source  # its weights are read from the files
    same = matches(model, weight_fingerprints(stream_model(source, dtype=model.dtype)))
    if same is None:
        raise InvalidSetting(
            f"the weights of the loaded model are quantised: give {name} itself, which is loaded as it is stored"
        )
    if not same:
        raise InvalidSetting(
            f"the weights of the loaded model are not those of {name}, where it says that it was loaded from: save it "
            "and give the folder"
        )
    return source


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model in evaluation mode and without gradients inside the block, and as it was after it."""
    training = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in trained:
            parameter.requires_grad_(True)
