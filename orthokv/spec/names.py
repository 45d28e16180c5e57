"""What checkpoint folders and their configurations are called. Imports nothing."""

from __future__ import annotations

FORMAT_VERSION = 1
CONFIG, TENSORS, CARD = "orthokv.json", "orthokv.safetensors", "README.md"
QUANT_METHOD = "orthokv"
