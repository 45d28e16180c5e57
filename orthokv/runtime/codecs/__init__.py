"""How latents are stored. A codec is a name in :data:`CODECS` and the dtype that it stores for a model's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orthokv.spec.errors import InvalidSetting


def sixteen_bit(model_dtype: torch.dtype) -> torch.dtype:
    """16 bits a number, whatever the model computes in: a float32 model keeps bfloat16 latents."""
    return model_dtype if model_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def native(model_dtype: torch.dtype) -> torch.dtype:
    """The model's own dtype: nothing is rounded, and a float32 model stores 4 bytes a number."""
    return model_dtype


CODECS: dict[str, Callable[[torch.dtype], torch.dtype]] = {"16-bit": sixteen_bit, "native": native}
DEFAULT_CODEC = "16-bit"


def store_dtype(codec: str, model_dtype: torch.dtype) -> torch.dtype:
    """Dtype of stored latents; :class:`InvalidSetting` for an unknown codec."""
    if codec not in CODECS:
        raise InvalidSetting(f"codec must be one of {', '.join(CODECS)}, not {codec!r}")
    return CODECS[codec](model_dtype)
