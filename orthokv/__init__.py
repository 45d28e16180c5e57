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

from orthokv.spec.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from orthokv.checkpoint.read import Checkpoint, read_checkpoint
    from orthokv.planning.profile import ErrorProfile
    from orthokv.runtime.cache import cache_bytes
    from orthokv.serving.attach import attach, detach
    from orthokv.serving.quantizer import OrthoKVConfig, OrthoKVQuantizer
    from orthokv.spec.budget import Budget
    from orthokv.spec.errors import OrthoKVError

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
    "Budget": "orthokv.spec.budget",
    "Checkpoint": "orthokv.checkpoint.write",
    "ErrorProfile": "orthokv.planning.profile",
    "OrthoKVConfig": "orthokv.serving.quantizer",
    "OrthoKVError": "orthokv.spec.errors",
    "OrthoKVQuantizer": "orthokv.serving.quantizer",
    "attach": "orthokv.serving.attach",
    "cache_bytes": "orthokv.runtime.cache",
    "detach": "orthokv.serving.attach",
    "read_checkpoint": "orthokv.checkpoint.write",
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
    import_module("orthokv.serving.quantizer")
