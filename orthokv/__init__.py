"""OrthoKV: a KV cache several times smaller, through orthonormal bases fitted to a model.

Importing this package teaches ``transformers`` to load full checkpoints::

    import orthokv
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("path/to/full/checkpoint")

and any loaded model to use an adapter: ``orthokv.attach(model, "path/to/adapter")``.
"""

from __future__ import annotations

__version__ = "0.1.0"

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
