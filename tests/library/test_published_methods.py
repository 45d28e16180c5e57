"""Methods under their published names, against the decomposition that their papers write down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthokv.fit.methods import Eigen, Palu, Weighted
from orthokv.fit.task import LayerView
from orthokv.spec.errors import UnsupportedModel
from orthokv.spec.vocabulary import KEY_MODES, KeyMode, Sharing
from tests.library.test_methods import LAYER, layer_of, span_error, view_of
from tests.support.tiny import GROUPINGS


def readers(x: Tensor, head: int, kv_heads: int) -> Tensor:
    """The query heads that read a KV head, of `[B, H, T, d]`."""
    repeats = x.shape[1] // kv_heads
    return x[:, head * repeats : (head + 1) * repeats]


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ------------------------------------------------------------------------------------------------ KQ-SVD


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "opt"])
@pytest.mark.parametrize("key_mode", KEY_MODES)
def test_weighted_head_is_kq_svd(key_mode: KeyMode, architecture: str) -> None:
    """KQ-SVD: with `K Q^T = U S W^T`, keys are cached as `K A`, `A = K^+ U_r`, and read by `Q B`, `B = K^T U_r`."""
    view, seen = layer_of(architecture, key_mode)
    geometry = view.geometry
    basis = Weighted().fit(view, "head", 0).key
    for head in range(geometry.kv_heads):
        key = rows(seen.key[:, head])
        query = rows(readers(seen.query, head, geometry.kv_heads))
        u = torch.linalg.svd(key @ query.T, full_matrices=False)[0]
        for rank in (1, geometry.head_dim // 2, geometry.head_dim - 1):
            kq_svd = key @ torch.linalg.pinv(key) @ u[:, :rank] @ (query @ key.T @ u[:, :rank]).T
            pair = basis.truncate(rank)
            ours = key @ pair.encoder[head].double() @ (query @ pair.decoder[head].double()).T
            assert float((ours - kq_svd).norm()) < 2e-3 * float(kq_svd.norm())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "opt"])
def test_weighted_head_approximates_what_the_output_projection_reads_best(architecture: str) -> None:
    """KQ-SVD's values: the best approximation of `V W_O` of its rank, `W_O` of all query heads that read `V`."""
    view, seen = layer_of(architecture, "pre")
    geometry = view.geometry
    basis = Weighted().fit(view, "head", 0).value
    output = view.output_weight.T.reshape(geometry.heads, geometry.head_dim, -1)
    repeats = geometry.heads // geometry.kv_heads
    for head in range(geometry.kv_heads):
        value = rows(seen.value[:, head])
        read = torch.cat([*output[head * repeats : (head + 1) * repeats]], dim=-1)
        left, s, right = torch.linalg.svd(value @ read, full_matrices=False)
        for rank in (1, geometry.head_dim // 2, geometry.head_dim - 1):
            pair = basis.truncate(rank)
            ours = value @ pair.encoder[head].double() @ pair.decoder[head].double().T @ read
            best = left[:, :rank] * s[:rank] @ right[:rank]
            assert float((ours - best).norm()) < 2e-3 * float(best.norm())


# -------------------------------------------------------------------------------------------------- Palu


def inputs_of(view: LayerView) -> Tensor:
    """What the projections of the layer read, `[tokens, hidden]`, float64."""
    layer = view.walk.layers[LAYER]
    return rows(layer.input_layernorm(view.walk.inputs).double())  # type: ignore[operator]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("sharing", GROUPINGS)
@pytest.mark.parametrize("whitened", [True, False])
def test_palu_is_the_svd_of_the_whitened_weights(whitened: bool, sharing: Sharing, architecture: str) -> None:
    """As released: the Cholesky factor of the input moment times the columns of the weight that belong to a group."""
    view = view_of(architecture)
    geometry = view.geometry
    fitted = Palu(whitened=whitened).fit(view, sharing, 0)
    x = inputs_of(view)
    root = torch.linalg.cholesky(x.T @ x).T if whitened else torch.eye(geometry.hidden_size).double()
    attention = view.seam.modules[LAYER]
    for basis, projection in ((fitted.key, attention.k_proj), (fitted.value, attention.v_proj)):
        heads = (root @ projection.weight.double().T).view(-1, geometry.kv_heads, geometry.head_dim)  # type: ignore[union-attr, operator]
        if len(basis.encoder) < basis.groups:  # one basis for all heads: their weights stand below each other
            groups = [heads.transpose(0, 1).flatten(0, 1)]
        else:
            groups = [part.flatten(1) for part in heads.split(basis.width // geometry.head_dim, dim=1)]
        for group, tall in enumerate(groups):
            vt = torch.linalg.svd(tall, full_matrices=False)[2]
            for rank in (1, basis.width // 2, basis.width - 1):
                found = basis.encoder[group, :, :rank].double()
                assert span_error(found, vt[:rank].T) < 1e-3, (group, rank)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("sharing", GROUPINGS)
def test_whitened_palu_is_eigen_where_keys_are_linear_in_the_input(
    sharing: Sharing, architecture: str
) -> None:
    view = view_of(architecture)
    palu, eigen = Palu().fit(view, sharing, 0), Eigen().fit(view, sharing, 0)
    for ours, other in ((palu.key, eigen.key), (palu.value, eigen.value)):
        for rank in (1, ours.width // 2):
            for p, q in zip(ours.truncate(rank).encoder, other.truncate(rank).encoder, strict=True):
                assert span_error(p.double(), q.double()) < 1e-3
    blocks = list(range(view.fitted_count))
    for rank in (3, 6):
        found = [view.compare(fitted.bases(rank, rank), blocks).error for fitted in (palu, eigen)]
        assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_without_whitening_keys_and_values_are_rebuilt_worse() -> None:
    view, seen = layer_of("llama", "pre")
    whitened, plain = Palu().fit(view, "joint", 0), Palu(whitened=False).fit(view, "joint", 0)
    for rank in (4, 8, 16):
        for x, good, bad in (
            (seen.key, whitened.key, plain.key),
            (seen.value, whitened.value, plain.value),
        ):
            lost = [
                float((x.float() - b.decode(b.encode(x.float()))).norm())
                for b in (good.truncate(rank), bad.truncate(rank))
            ]
            assert lost[0] < lost[1]


@pytest.mark.parametrize(
    ("architecture", "key_mode", "reason"),
    [
        ("qwen2", "pre", "k_proj of layer 1 adds a bias"),
        ("opt", "pre", "k_proj of layer 1 adds a bias"),
        ("qwen3", "pre", "keys .* in layer 1 a norm"),
        ("llama", "post", "keys .* in layer 1 .* RoPE"),
    ],
)
def test_palu_refuses_keys_that_are_no_linear_map_of_the_input(
    architecture: str, key_mode: KeyMode, reason: str
) -> None:
    view = view_of(architecture, key_mode)
    with pytest.raises(UnsupportedModel, match=reason):
        Palu().fit(view, "joint", 0)
    assert not view.seam.modules[LAYER].k_proj._forward_pre_hooks  # type: ignore[union-attr]
