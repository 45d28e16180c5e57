"""Where a model comes from: a local folder or a hub id, checked before anything of it is loaded.

A model is files of other people. Checked in this order: names (an allowlist; code and pickles are never
downloaded), settings (no key that makes `transformers` run or fetch code), weights (every shard there, each
header sound). `transformers` is then given a folder of links to the checked files and nothing else, so that
adapters, pickles, templates or modules that lie beside them cannot be picked up.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub import errors as hub
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from orthokv.spec.errors import (
    InvalidModel,
    InvalidSetting,
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    StorageError,
    UnsafeModel,
    UnsupportedModel,
)
from orthokv.spec.hub_ids import is_hub_id
from orthokv.spec.names import MODEL_SETTINGS, TOKENIZER_FILES, VOCABULARIES
from orthokv.spec.records import BaseModel

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# With these a settings file can make transformers run, fetch or swap code, or read other weights, even where
# the caller has switched remote code off. Refused at any depth, whatever their value.
REFUSED_KEYS = {"auto_map", "trust_remote_code", "custom_pipelines", "custom_generate", "fusion_config"}
REFUSED_KEYS |= {"attn_implementation", "experts_implementation", "transformers_weights"}
REFUSED_KEYS |= {"kernels", "use_kernels", "kernel_config", "kernel_mapping"}
# Underscored keys become private attributes of the configuration; these transformers itself writes.
HARMLESS_KEYS = {"_name_or_path", "_commit_hash", "_from_model_config", "_attn_implementation_autoset"}
# A switch of OPT, and how often Gemma 3 has a layer without a window: in every configuration of theirs.
HARMLESS_KEYS |= {"_remove_final_layer_norm", "_sliding_window_pattern"}

MAX_SETTINGS_BYTES = 64 << 20
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """A checked model on disk.

    `id` is what the user named, `revision` the commit of a hub model (None for a folder), `files` the
    names in `folder` that a load may read. `digest` (hex sha256) covers configuration and weights: equal
    digests mean the same model, wherever it lies.
    """

    id: str
    revision: str | None
    folder: Path
    digest: str
    files: tuple[str, ...]


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    max_weight_bytes: int | None = None,
    folders: bool = True,
) -> ModelSource:
    """Find `model` (a folder, else a hub id), check it and pin it; weights of a hub model are downloaded.

    With `HF_HUB_OFFLINE=1`, or while the hub is down, the cached copy of the revision is used; the answer
    says which commit that was. `cache_dir` None is the hub client's own cache. Weights of more than `max_weight_bytes`
    are refused before one of them is downloaded or read. Without `folders` it is a hub id, even where a folder of the
    same name lies.

    Raises:
        ModelNotFound, ModelGated: there is no such folder, model or revision, or no way to it.
        ModelTooLarge: its weights have more than `max_weight_bytes`.
        UnsafeModel: it would need pickles or code. UnsupportedModel: it is quantised, or an adapter.
        InvalidModel: files are missing, truncated or not JSON. StorageError: the cache cannot be written.
        InvalidSetting: a revision of a local folder.
    """
    path = Path(model).expanduser()
    if folders and path.is_dir():
        if revision is not None:
            raise InvalidSetting(f"revision {revision!r} cannot be chosen for {model}: it is a local folder")
        folder = path.resolve()
        files = _select(model, folder, _local_names(model, folder))
        _refuse_large(model, {name: (folder / name).stat().st_size for name in files}, max_weight_bytes)
        return ModelSource(model, None, folder, _verify(model, folder, files), files)
    if folders and path.exists():
        raise ModelNotFound(f"{model} is a file, not the folder of a model")
    if not is_hub_id(model):
        raise ModelNotFound(f"the model folder {model} does not exist")
    with _hub_errors(model, revision):
        commit = HfApi().resolve_revision(model, revision=revision, cache_dir=cache_dir).resolved
        # Settings first: a model that will be refused costs kilobytes, not its weights.
        small = [*MODEL_SETTINGS, *TOKENIZER_FILES, INDEX]
        folder = Path(snapshot_download(model, revision=commit, cache_dir=cache_dir, allow_patterns=small))
        tree = get_cached_repo_tree(model, revision=commit, cache_dir=cache_dir)
    files = _select(model, folder, frozenset(file.path for file in tree if "/" not in file.path))
    sizes = {file.path: file.size for file in tree if file.path in files}
    _refuse_large(model, sizes, max_weight_bytes)
    _refuse_without_room(model, folder, sizes)
    with _hub_errors(model, revision):
        snapshot_download(model, revision=commit, cache_dir=cache_dir, allow_patterns=list(files))
    return ModelSource(model, commit, folder, _verify(model, folder, files), files)


def recorded_model(recorded: BaseModel, revision: str | None = None) -> ModelSource:
    """The model that a profile or checkpoint names, at the commit that it names unless `revision` says another."""
    return resolve_model(recorded["id"], revision=revision or recorded["revision"])


def _refuse_large(model: str, sizes: Mapping[str, int], max_weight_bytes: int | None) -> None:
    found = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    if max_weight_bytes is not None and found > max_weight_bytes:
        raise ModelTooLarge(f"model {model} has {found} bytes of weights; {max_weight_bytes} are allowed")


def _refuse_without_room(model: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Before hours of downloading: is there room for what is not there yet?"""
    missing = sum(size for name, size in sizes.items() if not (folder / name).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise StorageError(
            f"the download of model {model} needs {missing} bytes; the cache's disk has {free}"
        )


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub client raises into one sentence; the client's own error stays as the cause."""
    try:
        yield
    except hub.GatedRepoError as error:
        raise ModelGated(f"model {model} is gated: accept its terms on the hub and log in there") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise ModelNotFound(f"{model} is neither a folder nor a model that the hub shows you") from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFound(f"model {model} has no revision {revision!r}") from error
    except Exception as error:
        answer = error if isinstance(error, hub.HfHubHTTPError) else error.__cause__
        if isinstance(answer, hub.HfHubHTTPError):
            status = answer.response.status_code
            kind = ModelGated if status in (401, 403) else ModelNotFound
            raise kind(f"the hub answers with status {status} when asked for model {model}") from error
        if isinstance(error, (hub.LocalEntryNotFoundError, hub.RevisionResolutionError)):
            raise ModelNotFound(f"the hub cannot be reached for {model}, and no copy is cached") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise StorageError(f"the cache cannot be written for {model}: {error.strerror}") from error
        raise ModelNotFound(f"model {model} cannot be downloaded: {first_line(error)}") from error


def _local_names(model: str, folder: Path) -> frozenset[str]:
    # A snapshot in the hub's cache is links into the cache; in any other folder links must stay inside.
    cached = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    root = folder.parents[2] if cached else folder
    files = [entry for entry in folder.iterdir() if entry.is_file()]
    for file in files:
        read = file.name.endswith((".json", ".safetensors", *TOKENIZER_FILES))
        if read and not file.resolve().is_relative_to(root):
            raise UnsafeModel(f"{file.name} of model {model} is a link that leads out of the folder")
    return frozenset(file.name for file in files)


def _select(model: str, folder: Path, names: frozenset[str]) -> tuple[str, ...]:
    """The files that a load needs, sorted, after every check that can be made without the weights."""
    if "adapter_config.json" in names:
        raise UnsupportedModel(f"{model} holds an adapter (adapter_config.json): merge it into its model")
    if CONFIG not in names:
        raise InvalidModel(f"model {model} has no {CONFIG}")
    for name in sorted(names & set(MODEL_SETTINGS)):
        _refuse_code(model, name, _read_json(model, folder, name))
    quantised = _read_json(model, folder, CONFIG).get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, "orthokv"):
        raise UnsupportedModel(f"model {model} is quantised with {method!r}: give the unquantised model")
    weights = _weight_files(model, folder, names)
    return tuple(sorted({*weights, *names & {*MODEL_SETTINGS, *TOKENIZER_FILES}}))


def _weight_files(model: str, folder: Path, names: frozenset[str]) -> set[str]:
    """`model.safetensors`, else the index with its shards: what transformers would load, in its order."""
    if WEIGHTS in names:
        return {WEIGHTS}
    if INDEX in names:
        shards = _read_json(model, folder, INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InvalidModel(f"{INDEX} of model {model} has no weight_map")
        for tensor, shard in shards.items():
            if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
                raise UnsafeModel(f"{INDEX} of model {model} names {shard!r} for {tensor}: no safetensors")
            if shard not in names:
                raise InvalidModel(f"{INDEX} of model {model} names {shard}, which is missing")
        return {INDEX, *shards.values()}
    if pickles := sorted(name for name in names if name.lower().endswith(PICKLES)):
        raise UnsafeModel(f"model {model} has no safetensors, only pickles, which can run code: {pickles[0]}")
    raise InvalidModel(f"model {model} has neither {WEIGHTS} nor {INDEX}")


def _read_json(model: str, folder: Path, name: str) -> dict[str, Any]:
    with open(folder / name, "rb") as file:
        raw = file.read(MAX_SETTINGS_BYTES + 1)
    if len(raw) > MAX_SETTINGS_BYTES:
        raise InvalidModel(f"{name} of model {model} is larger than {MAX_SETTINGS_BYTES} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{name} of model {model} is not valid JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{name} of model {model} holds a {type(value).__name__}, not an object")
    return value


def _refuse_code(model: str, name: str, settings: dict[str, Any]) -> None:
    # Records in a tokenizer's settings (`__type`) may begin with an underscore; nothing is made of them.
    private = name != "tokenizer_config.json"
    stack: list[Any] = [settings]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for key in value:
                hidden = private and key.startswith("_") and key not in HARMLESS_KEYS
                if hidden or key in REFUSED_KEYS:
                    raise UnsafeModel(f"{name} of model {model} holds {key!r}: loading it could run code")
        stack += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _verify(model: str, folder: Path, files: Iterable[str]) -> str:
    """Check every safetensors header against the size of its file; return the model's digest."""
    total = hashlib.sha256()
    for name in sorted(files):
        if name == CONFIG:
            # In one canonical form and without our own entry: a model exported together with its compression
            # is still recognised as the model that it was made from.
            content = hashlib.sha256(json.dumps(_base_config(model, folder), sort_keys=True).encode())
        elif name.endswith(".safetensors"):
            try:
                with (
                    safe_open(folder / name, framework="pt", backend="pread"),
                    open(folder / name, "rb") as file,
                ):
                    content = hashlib.file_digest(file, "sha256")  # in chunks; opening checked all sizes
            except SafetensorError as error:
                reason = first_line(error).removeprefix("Error while deserializing header: ")
                raise InvalidModel(f"{name} of model {model} is truncated or damaged: {reason}") from error
        else:
            continue
        total.update(f"{content.hexdigest()}  {name}\n".encode())
    return total.hexdigest()


def _base_config(model: str, folder: Path) -> dict[str, Any]:
    config = _read_json(model, folder, CONFIG)
    config.pop("quantization_config", None)  # None, or ours: others were refused
    return config


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The uncompressed model in evaluation mode, without gradients; `dtype` None keeps the stored one.

    `attn_implementation` None takes `sdpa` where the model has it: it lacks softcaps and attention sinks.

    Raises:
        UnsupportedModel: transformers has no causal language model of this type.
        InvalidModel: the weights do not fit the configuration, or are not finite (the tensor is named).
        InvalidSetting: no such device or attention.
    """
    target = resolve_device(device)
    with _only_checked(source) as folder, quiet_transformers():
        config = _load_config(source, folder)
        safety = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
        # Other shapes are reported in `info` only where they are ignored; check_weights refuses them.
        wanted: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
        wanted |= {"attn_implementation": attn_implementation, "ignore_mismatched_sizes": True}
        load: Any = AutoModelForCausalLM.from_pretrained
        try:
            model, info = load(folder, config=config, **wanted, **safety)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except ImportError as error:
            raise InvalidSetting(f"attention {attn_implementation!r} is not installed") from error
        except Exception as error:
            raise InvalidModel(f"model {source.id} cannot be loaded: {first_line(error)}") from error
    check_weights(source, info)
    model = cast(PreTrainedModel, model.to(target).eval().requires_grad_(False))
    model.config._name_or_path = model.name_or_path = source.id
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_finite(source, name, tensor)
    return model


def load_config(source: ModelSource) -> Any:
    """The model's configuration as transformers reads it.

    Raises:
        UnsupportedModel, InvalidModel: as `load_model` would.
    """
    with _only_checked(source) as folder, quiet_transformers():
        return _load_config(source, folder)


def _load_config(source: ModelSource, folder: Path) -> Any:
    model_type = _read_json(source.id, folder, CONFIG).get("model_type")
    if str(model_type) not in CONFIG_MAPPING:
        raise UnsupportedModel(f"model type {model_type!r} of {source.id} is not known to transformers")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InvalidModel(f"{CONFIG} of model {source.id} is not valid: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"model type {model_type!r} of {source.id} is not a causal language model")
    return config


def check_finite(source: ModelSource, name: str, tensor: torch.Tensor) -> None:
    """Refuse a weight that is not finite; raises `InvalidModel` naming it."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise InvalidModel(f"{name} of model {source.id} is not finite in {tensor.dtype}")


def check_weights(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuse weights that do not fit the model, by what `transformers` reports of a load; raises `InvalidModel`."""
    faults = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name} has no place in the model" for name in sorted(info["unexpected_keys"])]
    for name, stored, expected in sorted(info["mismatched_keys"]):
        faults.append(f"{name} has shape {list(stored)} instead of {list(expected)}")
    faults += info["error_msgs"]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InvalidModel(f"weights of {source.id} do not fit its {CONFIG}: {'; '.join(faults[:3])}{more}")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Chat templates are not loaded: calibration text is plain text.

    Raises:
        InvalidModel: there is none, or its files are damaged.
    """
    if not set(VOCABULARIES) & set(source.files):
        raise InvalidModel(f"model {source.id} has no tokenizer: none of {', '.join(VOCABULARIES)} is there")
    with _only_checked(source) as folder, quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise InvalidModel(f"tokenizer of {source.id} cannot be loaded: {first_line(error)}") from error
    tokenizer.name_or_path = source.id
    return tokenizer


@contextmanager
def _only_checked(source: ModelSource) -> Iterator[Path]:
    """A temporary folder with links to the checked files and nothing else for transformers to find."""
    with tempfile.TemporaryDirectory(prefix="orthokv-") as name:
        folder = Path(name)
        for file in source.files:
            if file == CONFIG:
                (folder / CONFIG).write_text(json.dumps(_base_config(source.id, source.folder)))
            else:
                (folder / file).symlink_to((source.folder / file).resolve())
        yield folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no warnings: what matters of them is checked here and raised."""
    quiet: Any = logging  # its switches carry no annotations
    verbosity, bars = quiet.get_verbosity(), quiet.is_progress_bar_enabled()
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        yield
    finally:
        quiet.set_verbosity(verbosity)
        if bars:
            quiet.enable_progress_bar()


def resolve_device(name: str) -> torch.device:
    """The device named `auto` (an accelerator, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        InvalidSetting: this machine has no such device.
    """
    here = ["mps"] if torch.backends.mps.is_available() else []
    if torch.cuda.is_available():
        here = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    here.append("cpu")
    if name != "auto" and name not in here:
        raise InvalidSetting(f"device {name!r} is not available: choose from auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
