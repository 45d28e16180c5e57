"""Rotary embedding as data gives what the model's own function gives, bit for bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from orthokv.models.architectures import ARCHITECTURES
from orthokv.models.geometry import attention_modules, geometry_of, layer_rotaries
from orthokv.models.rotary import Rotation
from tests.support.tiny import VARIANTS, tiny_model

ROTATED = [name for name in VARIANTS if ARCHITECTURES[name.split("+")[0]].rotary is not None]
# Numbers of a tiny model's heads that turn, where it is not all of them.
PARTIAL = {"phi": 4, "phi3": 6, "phi3+longrope": 6, "gpt_neox": 4, "glm4": 8, "stablelm": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROTATED)
def test_turning_is_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name)
    geometry = geometry_of(model.config)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, geometry.heads, 7, geometry.head_dim, generator=generator).to(dtype)
    key = torch.randn(2, geometry.kv_heads, 7, geometry.head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 60, (2, 7), generator=generator)
    for module, rotary in zip(attention_modules(model), layer_rotaries(model, geometry), strict=True):
        if rotary is None:
            continue
        own: Any = sys.modules[type(module).__module__]
        tables = rotary.module(query, positions, *rotary.arguments)
        width = PARTIAL.get(name, geometry.head_dim)
        # Some models split heads that turn in part in this function, some before it.
        turned = own.apply_rotary_pos_emb(query[..., :width], key[..., :width], *tables)
        for x, expected in zip((query, key), turned, strict=True):
            found = rotary.rotation.turn(x, rotary.tables(positions, query))
            assert found.dtype == dtype
            assert torch.equal(found[..., :width], expected)
            assert torch.equal(found[..., width:], x[..., width:])
            assert not torch.equal(found[..., :width], x[..., :width])


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_layout_of_a_models_tables_holds_the_same_angles(interleaved: bool) -> None:
    angles = torch.rand(1, 5, 3)
    cos, sin = angles.cos(), angles.sin()
    given = {
        "once": (cos, sin),
        "halves": (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
        "pairs": (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
    }
    for layout, tables in given.items():
        found = Rotation(interleaved=interleaved, layout=layout).once(tables)  # type: ignore[arg-type]
        assert torch.equal(found[0], cos)
        assert torch.equal(found[1], sin)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_by_an_angle_and_back_changes_nothing(interleaved: bool) -> None:
    x, angles = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.rand(1, 5, 3, dtype=torch.float64)
    rotation = Rotation(interleaved=interleaved)
    there = rotation.turn(x, (angles.cos(), angles.sin()))
    torch.testing.assert_close(rotation.turn(there, (angles.cos(), -angles.sin())), x)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
