"""What checkpoint folders and their configurations are called. Imports nothing."""

from __future__ import annotations

FORMAT_VERSION = 1
CONFIG, TENSORS, CARD = "orthokv.json", "orthokv.safetensors", "README.md"
QUANT_METHOD = "orthokv"
# What the library's attention functions are registered as: this and the name of the function that each wraps.
ATTENTION_PREFIX = "orthokv_"
