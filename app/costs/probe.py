"""What can be known about a model without loading it: its configuration and the headers of its safetensors files.

Nothing of it is trusted: names by an allowlist, sizes bounded before anything is read, JSON only.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx2

from app.costs.arithmetic import Shape
from app.jobs.vocabulary import JobErrorCode
from orthokv.spec.config import geometry_from_config
from orthokv.spec.errors import OrthoKVError
from orthokv.spec.geometry import Geometry
from orthokv.spec.names import MODEL_SETTINGS, TOKENIZER_FILES

_CONFIG = "config.json"
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 32 << 20
_MAX_SHARDS = 1000
_MAX_NUMBER = 1 << 40
_HUB_SECONDS = 3.0
_REDIRECTS = 3
_HALF = 2  # bytes of a number, where only the configuration is known

Source = Literal["files", "config", "nothing"]


class Unfit(Exception):
    """The folder holds no model that a worker would take."""

    def __init__(self, code: JobErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Known:
    """What is known of a model.

    Attributes:
        weight_bytes: as stored.
        copied_bytes: of the files of the model that a full checkpoint has as well.
        download_bytes: None where that is not known.
    """

    source: Source
    geometry: Geometry | None = None
    shape: Shape | None = None
    weight_bytes: int | None = None
    copied_bytes: int | None = None
    download_bytes: int | None = None


NOTHING = Known("nothing")


def read_folder(folder: Path) -> Known:
    """A folder of this machine; nothing is known of one that lies on the workers alone. Raises `Unfit`."""
    if not folder.is_dir():
        return NOTHING
    config = _bounded_json(folder / _CONFIG)
    shards = sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name) and path.is_file())
    if not shards:
        raise Unfit(JobErrorCode.MODEL_UNSAFE_FORMAT, "The model's folder holds no safetensors.")
    if len(shards) > _MAX_SHARDS:
        raise Unfit(JobErrorCode.MODEL_INVALID, f"The model has more than {_MAX_SHARDS} files of weights.")
    counted = [_count(shard) for shard in shards]
    parameters, weights = (sum(one[i] for one in counted) for i in (0, 1))
    geometry = _geometry(config)
    beside = (folder / name for name in (*MODEL_SETTINGS, *TOKENIZER_FILES))
    copied = sum(path.stat().st_size for path in (*shards, *beside) if path.is_file())
    return Known("files", geometry, _shape(config, geometry, parameters), weights, copied, download_bytes=0)


async def ask_hub(hub_url: str, model_id: str, revision: str | None) -> Known | Unfit:
    """The configuration of a hub's model, if the hub gives it to anybody and in time."""
    path = f"/{quote(model_id)}/resolve/{quote(revision or 'main', safe='')}/{_CONFIG}"
    url, host = hub_url.rstrip("/") + path, urlsplit(hub_url).netloc
    try:
        async with httpx2.AsyncClient(timeout=_HUB_SECONDS) as client:
            for _ in range(_REDIRECTS):
                async with client.stream("GET", url) as response:
                    if response.is_redirect and response.next_request is not None:
                        url = str(response.next_request.url)
                        if urlsplit(url).netloc != host:
                            return NOTHING
                        continue
                    if not response.is_success:
                        return NOTHING
                    text = b""
                    async for chunk in response.aiter_bytes():
                        text += chunk
                        if len(text) > _MAX_CONFIG_BYTES:
                            return NOTHING
                    return _of_config(json.loads(text))
    except Unfit as unfit:
        return unfit
    except (httpx2.HTTPError, ValueError, RecursionError):
        pass
    return NOTHING


def _of_config(config: object) -> Known:
    if not isinstance(config, dict):
        raise Unfit(JobErrorCode.MODEL_INVALID, "The model's config.json is not an object.")
    geometry = _geometry(config)
    shape = _shape(config, geometry, None)
    weights = None if shape is None else shape.parameters * _HALF
    return Known("config", geometry, shape, weights, copied_bytes=weights, download_bytes=weights)


def _bounded_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
            raise Unfit(JobErrorCode.MODEL_INVALID, "The model's folder has no config.json of a usable size.")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unfit(JobErrorCode.MODEL_INVALID, "The model's config.json cannot be read.") from error
    if not isinstance(value, dict):
        raise Unfit(JobErrorCode.MODEL_INVALID, "The model's config.json is not an object.")
    return value


def _count(shard: Path) -> tuple[int, int]:
    """Numbers and bytes in a safetensors file, by its header."""
    broken = Unfit(JobErrorCode.MODEL_INVALID, f"{shard.name} is not a sound safetensors file.")
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise broken
            header = json.loads(file.read(length))
            numbers = size = 0
            for name, tensor in header.items():
                if name != "__metadata__":
                    numbers += math.prod(map(_natural, tensor["shape"]))
                    begin, end = tensor["data_offsets"]
                    size += _natural(end) - _natural(begin)
    except (OSError, ValueError, RecursionError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise broken from error
    if not 0 <= size <= shard.stat().st_size - 8 - length:
        raise broken
    return numbers, size


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("is not a natural number of a usable size")
    return value


def _geometry(config: dict[str, Any]) -> Geometry:
    """What the configuration tells, as the worker would read it; `Unfit` where that would refuse."""
    try:
        return geometry_from_config(config)
    except OrthoKVError as error:
        raise Unfit(JobErrorCode(error.code), str(error)) from error


def _shape(config: dict[str, Any], geometry: Geometry, parameters: int | None) -> Shape | None:
    """The shape of a model, by the names that architectures have for what is not attention; None where that is missing."""

    def find(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if (value := _natural(found)) == 0:
            raise ValueError("is zero")
        return value

    try:
        vocabulary = find("vocab_size")
        if parameters is None:
            hidden = geometry.hidden_size
            inner = find("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
            # Gated, as nearly all are by now; experts multiply it.
            block = 3 * hidden * inner * find("num_local_experts", "num_experts", default=1)
            attention = 2 * hidden * geometry.head_dim * (geometry.heads + geometry.kv_heads)
            tied = config.get("tie_word_embeddings") is True
            parameters = geometry.layers * (block + attention) + vocabulary * hidden * (1 if tied else 2)
    except ValueError:
        return None
    return Shape.of(geometry, parameters, vocabulary)
