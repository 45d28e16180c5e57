"""Checkpoints and profiles that earlier versions wrote load, and give the logits that they gave then.

The folders of `tests/data/written_before` were written by version 0.1.0 before the library had its present folders: a full
checkpoint with keys after RoPE (Llama, `oblique`, refined and polished) and an adapter with keys before RoPE (Gemma 3, sliding
windows, `auto` sharing). Beside each lie token ids and the logits of then, with and without a cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import orthokv
from orthokv.checkpoint.read import read_checkpoint
from orthokv.checkpoint.write import record_measurements, write_checkpoint
from orthokv.files.digests import verify_files
from orthokv.planning.allocate import allocate
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import seam_of
from orthokv.spec.budget import Budget

WRITTEN = Path(__file__).parents[1] / "data" / "written_before"
NAMES = ("adapter-before-rope", "full-after-rope")


def loaded(name: str) -> PreTrainedModel:
    if name.startswith("full"):
        model = AutoModelForCausalLM.from_pretrained(WRITTEN / name, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(WRITTEN / "adapter-base-model", dtype=torch.float32)
        orthokv.attach(model, WRITTEN / name)
    assert seam_of(model) is not None
    return model.eval()


@torch.no_grad()
def step_by_step(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a prefill of 20 tokens and of each further one."""
    cache = DynamicCache(config=model.config)
    parts = [ids[:, :20], *ids[:, 20:].split(1, dim=1)]
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_logits_that_it_gave_then(name: str) -> None:
    model, then = loaded(name), load_file(WRITTEN / f"{name}.logits.safetensors")
    with torch.no_grad():
        uncached = model(then["ids"], use_cache=False).logits
    # Other CPUs add in another order; another basis, rank or position is off by far more.
    assert torch.allclose(uncached, then["uncached"], atol=1e-4, rtol=1e-4)
    assert torch.allclose(step_by_step(model, then["ids"]), then["cached"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_its_cache_has_the_bytes_that_it_declared_then(name: str) -> None:
    checkpoint = read_checkpoint(WRITTEN / name)
    assert checkpoint.declared_bytes(sequences=1, tokens=1) == checkpoint.config["cache"]["bytes_per_token"]


@pytest.mark.parametrize("name", NAMES)
def test_its_profile_makes_another_checkpoint(name: str, tmp_path: Path) -> None:
    profile = ErrorProfile.load(WRITTEN / name)
    plan = allocate(profile, Budget("kept", 0.7))
    assert write_checkpoint(profile, plan, tmp_path / "out").config["cache"]["kept"] == plan.kept <= 0.7


@pytest.mark.parametrize("name", NAMES)
def test_measurements_can_be_put_into_it(name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copytree(WRITTEN / name, copy)
    measured = read_checkpoint(copy).config["measured"]
    assert measured is not None
    record_measurements(copy, {**measured, "perplexity": 7.0})
    verify_files(copy)
    found = read_checkpoint(copy).config["measured"]
    assert found is not None
    assert found["perplexity"] == 7.0
