"""What a supervisor says to a runner (one JSON object on stdin) and hears from it (JSON lines on stdout)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target

MAX_LINE_BYTES = 8 << 20


class ProtocolError(Exception):
    """The child said something that is not in the protocol."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelRef(_Message):
    id: str
    revision: str | None
    max_weight_bytes: int | None = None


class DatasetRef(_Message):
    source: str
    """An absolute file, or `self`."""
    format: str | None
    field: str
    shown: str | None = None
    """What its owner calls the file; what is said of it says this name."""


class Request(_Message):
    """One step to run. `layers` are those that a fit step still owes."""

    step: str
    job_id: str
    workdir: str
    model: ModelRef
    dataset: list[DatasetRef]
    """One text, or the parts of a mixture."""
    settings: FitSettings
    target: Target
    layers: list[int]
    inputs: dict[str, str]
    device: str
    spill: bool
    """Whether hidden states are kept in files of the working folder."""


class Progress(_Message):
    type: Literal["progress"] = "progress"
    phase: Annotated[str, Field(min_length=1, max_length=64)]
    done: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(ge=0)]
    unit: Annotated[str, Field(min_length=1, max_length=32)]


class File(_Message):
    """A finished file in the working folder."""

    type: Literal["file"] = "file"
    # One path component that is safe on every file system and in every header.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
    path: str
    media_type: Annotated[str, Field(pattern=r"^[a-z0-9.+-]+/[a-z0-9.+-]+(; ?[a-z0-9-]+=[A-Za-z0-9-]+)?$")]
    layer: Annotated[int, Field(ge=0)] | None = None
    metrics: dict[str, Any] = {}


class Usage(_Message):
    """Most memory that the runner has held so far, in bytes; of the GPU only if it used one."""

    type: Literal["usage"] = "usage"
    peak_bytes: Annotated[int, Field(ge=0)]
    peak_gpu_bytes: Annotated[int, Field(ge=0)] | None


class Result(_Message):
    type: Literal["result"] = "result"
    data: dict[str, Any]


class Error(_Message):
    """Why the step cannot be done. Nothing may follow."""

    type: Literal["error"] = "error"
    code: str
    message: str
    retryable: bool = False
    layer: int | None = None
    best: float | None = None


Message = Progress | File | Usage | Result | Error
_messages: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="type")])


def parse(line: bytes) -> Message:
    """The message of one line."""
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes")
    try:
        return _messages.validate_json(line)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ProtocolError(f"not a message: {problems}") from error
