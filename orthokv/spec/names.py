"""What files of checkpoints and models are called. Imports nothing."""

from __future__ import annotations

FORMAT_VERSION = 1
CONFIG, TENSORS, CARD = "orthokv.json", "orthokv.safetensors", "README.md"
PROFILE_JSON, PROFILE_TENSORS = "profile.json", "profile.safetensors"
QUANT_METHOD = "orthokv"
# What the library's attention functions are registered as: this and the name of the function that each wraps.
ATTENTION_PREFIX = "orthokv_"
# What a load may read of a model besides its weights.
MODEL_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "special_tokens_map.json", "added_tokens.json")
