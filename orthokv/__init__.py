"""OrthoKV: a KV cache several times smaller, through orthonormal bases fitted to a model.

    import orthokv

    orthokv.compress("org/model", "calibration.jsonl", kept=0.25, out="small")
    orthokv.attach(model, "small")  # any loaded model of these weights

Importing this package also teaches `transformers` to load full checkpoints: `AutoModelForCausalLM.from_pretrained("full")`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from orthokv.spec.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from orthokv.checkpoint.read import Checkpoint, read_checkpoint
    from orthokv.face import compress, evaluate, load_profile, plan
    from orthokv.fit.methods import register_method
    from orthokv.planning.profile import ErrorProfile
    from orthokv.runtime.cache import cache_bytes
    from orthokv.serving.attach import attach, detach
    from orthokv.serving.quantizer import OrthoKVConfig, OrthoKVQuantizer
    from orthokv.spec.budget import Budget
    from orthokv.spec.errors import OrthoKVError
    from orthokv.spec.rankgrid import RankGrid
    from orthokv.spec.settings import FitSettings
    from orthokv.spec.target import Target
    from orthokv.text.source import TextSource

__all__ = [
    "Budget",
    "Checkpoint",
    "ErrorProfile",
    "FitSettings",
    "OrthoKVConfig",
    "OrthoKVError",
    "OrthoKVQuantizer",
    "RankGrid",
    "Target",
    "TextSource",
    "__version__",
    "attach",
    "cache_bytes",
    "compress",
    "detach",
    "evaluate",
    "load_profile",
    "plan",
    "read_checkpoint",
    "register_method",
]

# Loaded when they are used: `orthokv serve` and `orthokv jobs` need no torch.
_HOMES = {
    "Budget": "orthokv.spec.budget",
    "Checkpoint": "orthokv.checkpoint.read",
    "ErrorProfile": "orthokv.planning.profile",
    "FitSettings": "orthokv.spec.settings",
    "OrthoKVConfig": "orthokv.serving.quantizer",
    "OrthoKVError": "orthokv.spec.errors",
    "OrthoKVQuantizer": "orthokv.serving.quantizer",
    "RankGrid": "orthokv.spec.rankgrid",
    "Target": "orthokv.spec.target",
    "TextSource": "orthokv.text.source",
    "attach": "orthokv.serving.attach",
    "cache_bytes": "orthokv.runtime.cache",
    "compress": "orthokv.face",
    "detach": "orthokv.serving.attach",
    "evaluate": "orthokv.face",
    "load_profile": "orthokv.face",
    "plan": "orthokv.face",
    "read_checkpoint": "orthokv.checkpoint.read",
    "register_method": "orthokv.fit.methods",
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
