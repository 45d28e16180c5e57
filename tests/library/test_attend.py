"""Which implementation computes a step is looked up in one table, and all of them compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from orthokv.bases.basis import Basis
from orthokv.models.rotary import Rotation
from orthokv.runtime import attend as attending
from orthokv.runtime.attend import (
    TABLE,
    Attended,
    Held,
    Implementation,
    Step,
    Stock,
    Turn,
    attend,
    implementation,
)
from orthokv.runtime.codecs import codec_of
from tests.support.tiny import tiny_model, tiny_seam, tiny_tokens

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 8


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Attended:
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    weights = (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def held(rank: int, heads_together: int, codec: str = "native") -> Held:
    width, generator = heads_together * HEAD_DIM, torch.Generator().manual_seed(rank)
    shape = (KV_HEADS // heads_together, width, width)
    encoder = torch.linalg.qr(torch.randn(shape, generator=generator))[0][..., :rank]
    basis = Basis(encoder, encoder, KV_HEADS, HEAD_DIM)
    packing = codec_of(codec, torch.float32)
    rows = packing.pack(torch.randn(2, basis.groups, 11, rank, generator=generator))
    return Held(basis, packing, rows, None)


def step(keys: Held, values: Held, tokens: int = 1, turn: Turn | None = None) -> Step:
    query = torch.randn(2, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    stock = Stock(plain, None, {}, is_causal=True, training=False, sinks=None)
    return Step(query, keys, values, turn, stock)


def a_turn() -> Turn:
    rotation = Rotation()
    tables = [(torch.rand(2, n, 4).cos(), torch.rand(2, n, 4).sin()) for n in (1, 11)]
    return Turn(rotation, tables[0], tables[1])


@pytest.mark.parametrize(
    ("keys", "values", "tokens", "turned", "name"),
    [
        ((5, 1), (8, 1), 1, False, "latents"),
        ((5, 1), (9, 2), 1, False, "latent keys"),
        ((9, 2), (5, 1), 1, False, "latent values"),
        ((5, 1), (5, 1), 1, True, "latent values"),
        ((5, 1), (9, 4), 1, True, "reference"),
        ((9, 4), (9, 4), 1, False, "reference"),
        ((5, 1), (5, 1), 2, False, "reference"),
    ],
)
def test_one_token_attends_to_latents_no_wider_than_a_head(
    keys: tuple[int, int], values: tuple[int, int], tokens: int, turned: bool, name: str
) -> None:
    asked = step(held(*keys), held(*values), tokens, a_turn() if turned else None)
    assert implementation(asked).name == name


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("together", [1, 2, 4])
def test_every_implementation_that_fits_gives_what_the_reference_gives(together: int, turned: bool) -> None:
    asked = step(held(5, together), held(7, together), 1, a_turn() if turned else None)
    expected = attending.reference(asked)
    fitting = [candidate for candidate in TABLE if candidate.fits(asked)]
    assert len(fitting) == (2 if turned else 4)
    for candidate in fitting:
        output, weights = candidate.run(asked)
        torch.testing.assert_close(output, expected[0])
        torch.testing.assert_close(weights, expected[1])


def test_the_last_implementation_computes_everything() -> None:
    last = TABLE[-1]
    assert last == Implementation("reference", attending.reference)
    heads = Held(None, None, None, torch.randn(2, KV_HEADS, 11, HEAD_DIM))
    assert implementation(step(heads, heads)) is last


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({}, True),
        ({"devices": ("cpu", "cuda")}, True),
        ({"devices": ("cuda",)}, False),
        ({"codecs": ("native", "16-bit")}, True),
        ({"codecs": ("native",)}, False),
        ({"key_mode": "pre"}, False),
        ({"key_mode": "post"}, True),
        ({"query_tokens": 1}, False),
        ({"query_tokens": 2}, True),
        ({"key_rank": 4}, False),
        ({"key_rank": 5}, True),
        ({"value_rank": "head"}, False),
        ({"value_rank": 9}, True),
    ],
)
def test_a_kernel_computes_the_steps_within_its_limits_before_all_others(
    limits: dict[str, Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = replace(Implementation("kernel", lambda asked: (asked.query, None)), **limits)
    monkeypatch.setattr(attending, "TABLE", (kernel, *TABLE))
    asked = step(held(5, 1), held(9, 2, "16-bit"), tokens=2)
    assert (implementation(asked) is kernel) is fits
    assert (attend(asked)[0] is asked.query) is fits


@torch.no_grad()
def test_the_seam_asks_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def noted(asked: Step) -> Attended:
        seen.append((asked.query.device.type, asked.keys.codec.name if asked.keys.codec else None))
        return attending.reference(asked)

    monkeypatch.setattr(attending, "TABLE", (Implementation("noted", noted, query_tokens=1), *TABLE))
    model, ids = tiny_model("llama"), tiny_tokens(1, 6)
    with tiny_seam(model, "pre"):
        cache = DynamicCache(config=model.config)
        whole = model(ids, use_cache=False).logits
        for part in ids.split([5, 1], dim=1):
            last = model(part, past_key_values=cache, use_cache=True).logits
    assert seen == [("cpu", "native")] * 3
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)
