"""What checkpoint folders and their configurations are called. Imports nothing."""

from __future__ import annotations

FORMAT_VERSION = 1
CONFIG, TENSORS, CARD = "orthokv.json", "orthokv.safetensors", "README.md"
PROFILE_JSON, PROFILE_TENSORS = "profile.json", "profile.safetensors"
QUANT_METHOD = "orthokv"
