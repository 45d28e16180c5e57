"""OrthoKV: a KV cache several times smaller, through orthonormal bases fitted to a model.

Importing this package teaches ``transformers`` to load full checkpoints::

    import orthokv
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("path/to/full/checkpoint")

and any loaded model to use an adapter: ``orthokv.attach(model, "path/to/adapter")``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from orthokv.budget import Budget
    from orthokv.checkpoint import Checkpoint, read_checkpoint
    from orthokv.errors import OrthoKVError
    from orthokv.profile import ErrorProfile
    from orthokv.runtime.attach import attach, detach
    from orthokv.runtime.cache import cache_bytes
    from orthokv.runtime.quantizer import OrthoKVConfig, OrthoKVQuantizer

__all__ = [
    "Budget",
    "Checkpoint",
    "ErrorProfile",
    "OrthoKVConfig",
    "OrthoKVError",
    "OrthoKVQuantizer",
    "__version__",
    "attach",
    "cache_bytes",
    "detach",
    "read_checkpoint",
]

# Loaded when they are used: `orthokv serve` and `orthokv jobs` need no torch.
_HOMES = {
    "Budget": "orthokv.budget",
    "Checkpoint": "orthokv.checkpoint",
    "ErrorProfile": "orthokv.profile",
    "OrthoKVConfig": "orthokv.runtime.quantizer",
    "OrthoKVError": "orthokv.errors",
    "OrthoKVQuantizer": "orthokv.runtime.quantizer",
    "attach": "orthokv.runtime.attach",
    "cache_bytes": "orthokv.runtime.cache",
    "detach": "orthokv.runtime.attach",
    "read_checkpoint": "orthokv.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.modeling_utils")  # at once, if it is loaded already
def _register(_: object) -> None:
    """Teach `transformers` the format as soon as it can load models."""
    import_module("orthokv.runtime.quantizer")
