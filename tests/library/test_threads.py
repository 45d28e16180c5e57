"""Threads may share a compressed model, as they may share an uncompressed one: the state of a call travels with the call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.bench import MODEL
from orthokv.models.source import load_model, resolve_model
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.vocabulary import KEY_MODES, KeyMode
from tests.support.tiny import ARCHITECTURES, tiny_bases, tiny_model, tiny_seam, tiny_tokens

THREADS = 8


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual, so that what they could spoil is spoiled."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@torch.no_grad()
def everything(model: PreTrainedModel, ids: Tensor, new_tokens: int = 4) -> list[Tensor]:
    """What one user does: a forward without a cache, a prefill in two parts and a step with one, and generation."""
    cache = DynamicCache(config=model.config)
    generate: Any = model.generate
    return [
        model(ids, use_cache=False).logits,
        *(model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([7, 5, 1], dim=1)),
        generate(
            ids[:, :6],
            attention_mask=torch.ones_like(ids[:, :6]),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        ),
    ]


def assert_threads_change_nothing(model: PreTrainedModel, vocabulary: int, rounds: int) -> None:
    users = [tiny_tokens(1, 13, seed) % vocabulary for seed in range(THREADS)]
    alone = [everything(model, ids) for ids in users]
    together = Barrier(THREADS)

    def user(ids: Tensor) -> list[list[Tensor]]:
        torch.set_num_threads(1)  # of this thread
        together.wait()
        return [everything(model, ids) for _ in range(rounds)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(user, users))
    wrong = [
        (number, what)
        for number, (rounds_of_one, expected) in enumerate(zip(found, alone, strict=True))
        for made in rounds_of_one
        for what, (a, b) in enumerate(zip(made, expected, strict=True))
        if not torch.equal(a, b)
    ]
    assert wrong == []


@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_threads_that_share_a_model_get_what_each_gets_alone(name: str, key_mode: KeyMode) -> None:
    model = tiny_model(name)
    with tiny_seam(model, key_mode):
        assert_threads_change_nothing(model, 99, rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("key_mode", KEY_MODES)
def test_threads_that_share_a_trained_model_get_what_each_gets_alone(key_mode: KeyMode) -> None:
    if not MODEL.is_dir():
        pytest.skip(f"the trained model is not here: {MODEL}")
    model = load_model(resolve_model(str(MODEL)))
    with tiny_seam(model, key_mode):
        assert_threads_change_nothing(model, 99, rounds=4)


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_attention_without_its_call_is_refused(name: str) -> None:
    """It would be the uncompressed model's, in silence."""
    model = tiny_model(name)
    heads = torch.ones(1, 8, 3, 8)
    with tiny_seam(model, "post") as seam:
        attention = ALL_ATTENTION_FUNCTIONS[f"orthokv_{'eager' if name == 'mpt' else 'sdpa'}"]
        with pytest.raises(InvalidSetting, match="without its call"):
            attention(seam.modules[0], heads, heads, heads, None, scaling=1.0)


def test_a_module_that_computes_attention_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with tiny_seam(model, "post") as seam:
        module = cast(Any, seam.modules[1])
        monkeypatch.setattr(module, "forward", lambda hidden_states, **_: (hidden_states, None))
        with pytest.raises(InvalidSetting, match="without calling the function"):
            model(tiny_tokens(1, 4))


def test_bases_are_those_at_the_time_of_the_call() -> None:
    """Another thread may exchange them between the hook and the attention of a call."""
    model, ids = tiny_model("llama"), tiny_tokens(1, 9)
    with tiny_seam(model, "post") as seam, torch.no_grad():
        expected = model(ids, use_cache=False).logits
        others = tiny_bases(seam.geometry, seed=1)
        handles = [
            module.register_forward_pre_hook(lambda _, args, i=i: seam.set_bases(i, others[i]))
            for i, module in enumerate(seam.modules)
        ]
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        for handle in handles:
            handle.remove()
        assert not torch.equal(model(ids, use_cache=False).logits, expected)
