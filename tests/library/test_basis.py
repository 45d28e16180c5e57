"""Bases are what their algebra says: orthonormal, nested, adjoint, and exact at full rank."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokv.bases.basis import Basis, orthonormal
from orthokv.bases.manifold import RETRACTIONS, cholesky_qr, orthonormality_error, polar, qr, tangent
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import GROUP_HEADS, SHARINGS, Sharing

claim = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def point(stored: int, width: int, rank: int, seed: int) -> Tensor:
    return cast(Tensor, torch.linalg.qr(gaussian(stored, width, rank, seed=seed))[0])


def basis_of(
    sharing: Sharing, kv_heads: int, head_dim: int, seed: int, *, keys: bool = True, oblique: bool = False
) -> Basis:
    """A full-rank float64 basis: orthonormal, or an encoder with its inverse as decoder."""
    stored, width = group_width(sharing, kv_heads, head_dim, keys=keys)
    if not oblique:
        return orthonormal(point(stored, width, width, seed), kv_heads, head_dim)
    scales = 1 + gaussian(stored, 1, width, seed=seed).abs()
    encoder = point(stored, width, width, seed) * scales
    return Basis(encoder, torch.linalg.inv(encoder).transpose(-1, -2), kv_heads, head_dim)


@st.composite
def bases(draw: st.DrawFn) -> Basis:
    return basis_of(
        sharing := draw(st.sampled_from(SHARINGS)),
        draw(st.integers(1, 4)) * GROUP_HEADS.get(sharing, 1),
        draw(st.integers(1, 6)),
        draw(seeds),
        keys=draw(st.booleans()),
        oblique=draw(st.booleans()),
    )


def projector(matrix: Tensor) -> Tensor:
    """The orthogonal projector on the span of the columns, from an SVD: it shares no code with what is tested."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    u = u * (s > 1e-12 * s[..., :1]).unsqueeze(-2)
    return cast(Tensor, u @ u.transpose(-1, -2))


# ------------------------------------------------------------------------------------------------ the layout


@pytest.mark.parametrize(
    ("sharing", "keys", "expected"),
    [
        ("head", True, (4, 8)),
        ("head", False, (4, 8)),
        ("tied", True, (1, 8)),
        ("tied", False, (4, 8)),  # the papers tie the keys only
        ("pair", True, (2, 16)),
        ("pair", False, (2, 16)),
        ("quad", True, (1, 32)),
        ("quad", False, (1, 32)),
        ("joint", True, (1, 32)),
        ("joint", False, (1, 32)),
    ],
)
def test_width_and_stored_groups_of_each_sharing(
    sharing: Sharing, keys: bool, expected: tuple[int, int]
) -> None:
    assert group_width(sharing, 4, 8, keys=keys) == expected


@pytest.mark.parametrize(("sharing", "heads", "group"), [("pair", 3, 2), ("pair", 1, 2), ("quad", 6, 4)])
@pytest.mark.parametrize("keys", [True, False])
def test_groups_that_do_not_divide_the_heads_are_refused_with_their_number(
    sharing: Sharing, heads: int, group: int, keys: bool
) -> None:
    with pytest.raises(InvalidSetting, match=f"'{sharing}' makes groups of {group} .* this model's {heads}$"):
        group_width(sharing, heads, 8, keys=keys)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("keys", [True, False])
def test_at_full_rank_a_layer_stores_as_many_numbers_as_before(sharing: Sharing, keys: bool) -> None:
    basis = basis_of(sharing, 4, 8, 0, keys=keys)
    assert basis.latents_per_token == basis.groups * basis.rank == 4 * 8


@claim
@given(basis=bases(), batch=st.integers(1, 3), tokens=st.integers(1, 5), seed=seeds)
def test_encode_then_decode_is_the_identity_at_full_rank(
    basis: Basis, batch: int, tokens: int, seed: int
) -> None:
    x = gaussian(batch, basis.kv_heads, tokens, basis.head_dim, seed=seed)
    latent = basis.encode(x)
    assert latent.shape == (batch, basis.groups, tokens, basis.rank)
    torch.testing.assert_close(basis.decode(latent), x, rtol=1e-7, atol=1e-7)


def test_encode_reads_what_projections_hand_over_which_is_not_contiguous() -> None:
    basis = basis_of("joint", 4, 8, 0)
    x = gaussian(2, 5, 4, 8, seed=1)
    torch.testing.assert_close(basis.encode(x.transpose(1, 2)), basis.encode(x.transpose(1, 2).contiguous()))


def test_a_joint_latent_is_the_concatenated_heads_times_the_encoder() -> None:
    basis = basis_of("joint", 3, 4, 0).truncate(5)
    x = gaussian(1, 3, 7, 4, seed=1)
    rows = torch.cat([x[0, head] for head in range(3)], dim=-1)
    torch.testing.assert_close(basis.encode(x)[0, 0], rows @ basis.encoder[0])
    rebuilt = rows @ basis.encoder[0] @ basis.decoder[0].T
    torch.testing.assert_close(basis.decode(basis.encode(x))[0, 2], rebuilt[:, 8:])


@pytest.mark.parametrize(("sharing", "group"), [("pair", 2), ("quad", 4)])
def test_a_latent_of_a_group_is_its_neighbouring_heads_times_its_own_encoder(
    sharing: Sharing, group: int
) -> None:
    basis = basis_of(sharing, 8, 4, 0, oblique=True).truncate(5)
    x = gaussian(1, 8, 7, 4, seed=1)
    assert (basis.groups, basis.width) == (8 // group, 4 * group)
    for number in range(basis.groups):
        rows = torch.cat([x[0, number * group + head] for head in range(group)], dim=-1)
        latent = rows @ basis.encoder[number]
        torch.testing.assert_close(basis.encode(x)[0, number], latent)
        rebuilt = (latent @ basis.decoder[number].T).view(7, group, 4).transpose(0, 1)
        found = basis.decode(basis.encode(x))[0, number * group : (number + 1) * group]
        torch.testing.assert_close(found, rebuilt)


@pytest.mark.parametrize("sharing", ["head", "tied"])
def test_a_latent_of_a_head_depends_on_that_head_only(sharing: Sharing) -> None:
    basis = basis_of(sharing, 3, 4, 0).truncate(2)
    x = gaussian(1, 3, 5, 4, seed=1)
    changed = x.clone()
    changed[:, 1] += 1
    before, after = basis.encode(x), basis.encode(changed)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


# --------------------------------------------------------------------------------------------- truncation


@claim
@given(basis=bases(), data=st.data())
def test_truncation_is_the_prefix_of_the_latents(basis: Basis, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, basis.rank))
    x = gaussian(2, basis.kv_heads, 3, basis.head_dim, seed=data.draw(seeds))
    short = basis.truncate(rank)
    assert (short.rank, short.width, short.groups) == (rank, basis.width, basis.groups)
    assert short.orthonormal == basis.orthonormal
    torch.testing.assert_close(short.encode(x), basis.encode(x)[..., :rank])
    latent = basis.encode(x)
    latent[..., rank:] = 0
    torch.testing.assert_close(short.decode(short.encode(x)), basis.decode(latent))


@claim
@given(data=st.data())
def test_truncating_twice_is_truncating_once(data: st.DataObject) -> None:
    basis = data.draw(bases())
    middle = data.draw(st.integers(1, basis.rank))
    small = data.draw(st.integers(1, middle))
    twice, once = basis.truncate(middle).truncate(small), basis.truncate(small)
    assert torch.equal(twice.encoder, once.encoder)
    assert torch.equal(twice.decoder, once.decoder)


@pytest.mark.parametrize("rank", [0, -1, 9, 1000])
def test_a_rank_outside_the_width_is_refused_by_number(rank: int) -> None:
    with pytest.raises(InvalidSetting, match=rf"rank {rank} is outside 1\.\.8"):
        basis_of("head", 4, 8, 0).truncate(rank)


@claim
@given(basis=bases(), data=st.data())
def test_an_orthonormal_round_trip_never_adds_energy(basis: Basis, data: st.DataObject) -> None:
    if not basis.orthonormal:
        return
    short = basis.truncate(data.draw(st.integers(1, basis.rank)))
    x = gaussian(1, basis.kv_heads, 4, basis.head_dim, seed=data.draw(seeds))
    rebuilt = short.decode(short.encode(x))
    assert float(rebuilt.norm()) <= float(x.norm()) * (1 + 1e-9)
    torch.testing.assert_close(short.decode(short.encode(rebuilt)), rebuilt, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------------ adjoints


@claim
@given(basis=bases(), repeats=st.integers(1, 3), data=st.data())
def test_scores_of_latents_are_scores_of_the_rebuilt_keys(
    basis: Basis, repeats: int, data: st.DataObject
) -> None:
    """`q . decode(z) = query_to_latent(q) . z` for every query head, the KV head that it reads and every token."""
    basis = basis.truncate(data.draw(st.integers(1, basis.rank)))
    heads, tokens = basis.kv_heads * repeats, 4
    query = gaussian(2, heads, 3, basis.head_dim, seed=data.draw(seeds))
    latent = gaussian(2, basis.groups, tokens, basis.rank, seed=data.draw(seeds))
    rebuilt = basis.decode(latent).repeat_interleave(repeats, dim=1)
    expected = query @ rebuilt.transpose(-1, -2)
    per_head = latent.repeat_interleave(heads // basis.groups, dim=1)
    found = basis.query_to_latent(query) @ per_head.transpose(-1, -2)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@claim
@given(basis=bases(), repeats=st.integers(1, 3), data=st.data())
def test_attending_to_latents_and_lifting_is_attending_to_the_rebuilt_values(
    basis: Basis, repeats: int, data: st.DataObject
) -> None:
    basis = basis.truncate(data.draw(st.integers(1, basis.rank)))
    heads, tokens = basis.kv_heads * repeats, 4
    weights = gaussian(2, heads, 3, tokens, seed=data.draw(seeds)).softmax(-1)
    latent = gaussian(2, basis.groups, tokens, basis.rank, seed=data.draw(seeds))
    expected = weights @ basis.decode(latent).repeat_interleave(repeats, dim=1)
    attended = weights @ latent.repeat_interleave(heads // basis.groups, dim=1)
    found = basis.output_from_latent(attended.transpose(1, 2).contiguous())
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-7, atol=1e-7)


def test_decoder_rows_per_head_are_those_that_decode_uses() -> None:
    basis = basis_of("joint", 3, 4, 0).truncate(5)
    latent = gaussian(1, 1, 2, 5, seed=1)
    per_head = latent @ basis.decoder_per_head().transpose(-1, -2)
    torch.testing.assert_close(per_head, basis.decode(latent))


@pytest.mark.parametrize("oblique", [False, True])
def test_moving_to_another_dtype_keeps_what_is_one_tensor_one_tensor(oblique: bool) -> None:
    moved = basis_of("head", 2, 4, 0, oblique=oblique).to("cpu", torch.float32)
    assert moved.encoder.dtype == moved.decoder.dtype == torch.float32
    assert moved.orthonormal is not oblique


# -------------------------------------------------------------------------------------------- the manifold


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A point of the manifold and the same point after a step, as an optimiser hands it to a retraction."""
    width = draw(st.integers(1, 12))
    rank = draw(st.integers(1, width))
    start = point(draw(st.integers(1, 3)), width, rank, draw(seeds))
    direction = gaussian(*start.shape, seed=draw(seeds))
    length = draw(st.floats(0, 0.3))
    return start, start + length * direction / direction.norm(dim=(-2, -1), keepdim=True)


@pytest.mark.parametrize("name", RETRACTIONS)
@claim
@given(step=steps())
def test_every_retraction_returns_to_the_manifold(name: str, step: tuple[Tensor, Tensor]) -> None:
    found = RETRACTIONS[name](step[1])
    assert found.shape == step[1].shape
    assert orthonormality_error(found) < 1e-10


@pytest.mark.parametrize("name", RETRACTIONS)
@claim
@given(step=steps())
def test_every_retraction_leaves_a_point_of_the_manifold_where_it_is(
    name: str, step: tuple[Tensor, Tensor]
) -> None:
    torch.testing.assert_close(RETRACTIONS[name](step[0]), step[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", RETRACTIONS)
def test_every_retraction_agrees_with_a_tangent_step_to_first_order(name: str) -> None:
    start = point(2, 8, 3, seed=0)
    direction = tangent(start, gaussian(2, 8, 3, seed=1))
    errors = [
        float((RETRACTIONS[name](start + h * direction) - start - h * direction).norm()) for h in (1e-3, 1e-4)
    ]
    assert errors[1] < errors[0] / 50  # quadratic: a hundredth for a tenth of the step


@pytest.mark.parametrize("retract", [cholesky_qr, qr])
@claim
@given(step=steps())
def test_nested_retractions_keep_the_span_of_every_prefix(retract: Any, step: tuple[Tensor, Tensor]) -> None:
    """What makes one fit serve all ranks."""
    found = retract(step[1])
    for rank in range(1, found.shape[-1] + 1):
        torch.testing.assert_close(
            projector(found[..., :rank]), projector(step[1][..., :rank]), rtol=0, atol=1e-8
        )


@claim
@given(step=steps())
def test_cholesky_qr_is_the_qr_decomposition_with_a_positive_diagonal(step: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(cholesky_qr(step[1]), qr(step[1]), rtol=0, atol=1e-9)
    triangular = qr(step[1]).transpose(-1, -2) @ step[1]
    torch.testing.assert_close(triangular.tril(-1), torch.zeros_like(triangular), rtol=0, atol=1e-9)
    assert bool((triangular.diagonal(dim1=-2, dim2=-1) > 0).all())


@claim
@given(step=steps())
def test_the_polar_factor_is_the_nearest_point(step: tuple[Tensor, Tensor]) -> None:
    u, _, vt = torch.linalg.svd(step[1], full_matrices=False)
    torch.testing.assert_close(polar(step[1]), u @ vt, rtol=0, atol=1e-8)


def test_retractions_hold_in_float32_at_the_width_of_a_real_layer() -> None:
    start = point(1, 256, 256, seed=0).float()
    moved = start + 0.05 / 16 * gaussian(1, 256, 256, seed=1, dtype=torch.float32)
    for name, retract in RETRACTIONS.items():
        assert orthonormality_error(retract(moved)) < 1e-5, name


def test_qr_stays_orthonormal_where_columns_depend_on_each_other() -> None:
    """A basis with a zero column is no basis: the sign of a zero on the diagonal of R must not erase it."""
    matrix = torch.zeros(1, 4, 3, dtype=torch.float64)
    matrix[0, 0, 0] = 1
    assert orthonormality_error(qr(matrix)) < 1e-10


@claim
@given(step=steps(), seed=seeds)
def test_a_projected_gradient_is_tangent_and_projecting_again_changes_nothing(
    step: tuple[Tensor, Tensor], seed: int
) -> None:
    start = step[0]
    projected = tangent(start, gaussian(*start.shape, seed=seed))
    inner = start.transpose(-1, -2) @ projected
    torch.testing.assert_close(inner + inner.transpose(-1, -2), torch.zeros_like(inner), rtol=0, atol=1e-10)
    torch.testing.assert_close(tangent(start, projected), projected, rtol=0, atol=1e-10)


@claim
@given(step=steps(), first=seeds, second=seeds)
def test_the_tangent_projection_is_orthogonal(step: tuple[Tensor, Tensor], first: int, second: int) -> None:
    """What is removed from a gradient is perpendicular to every tangent vector."""
    start = step[0]
    gradient = gaussian(*start.shape, seed=first)
    other = tangent(start, gaussian(*start.shape, seed=second))
    removed = gradient - tangent(start, gradient)
    assert abs(float((removed * other).sum())) < 1e-9 * max(1.0, float(gradient.norm() * other.norm()))


@claim
@given(seed=seeds)
def test_the_orthonormality_error_is_the_largest_entry_that_is_off(seed: int) -> None:
    matrix = point(2, 6, 4, seed)
    assert orthonormality_error(matrix) < 1e-12
    bent = matrix.clone()
    bent[1, :, 2] *= 1.1
    assert orthonormality_error(bent) == pytest.approx(0.21)
