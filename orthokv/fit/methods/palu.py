"""Palu (Chang et al., ICLR 2025, arXiv 2407.21118): whitened SVD of the key and value projections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orthokv.fit.methods.base import FittedBases
from orthokv.fit.methods.eigen import Eigen
from orthokv.fit.task import LayerView
from orthokv.models.architectures import architecture_of
from orthokv.spec.errors import UnsupportedModel
from orthokv.spec.methods import PaluSettings
from orthokv.spec.vocabulary import Sharing

# Above rounding in 16 bits, far below what a norm, a clip or a rotation between projection and cache does.
_LINEAR = 1e-2


@dataclass(frozen=True)
class Palu(PaluSettings):
    """Bases from the weights: with `S S^T` the second moment of the layer's input, the SVD `S^T W_g = U Sigma V^T` of the
    columns of `W_k` (or `W_v`) that belong to group `g`.


    The rank-`r` weight that changes the projected calibration inputs least is `W_g V_r V_r^T`, so `x W_g` becomes
    `k V_r V_r^T`: an orthonormal basis `V_r` of the keys. `V` are the eigenvectors of `W_g^T S S^T W_g`, for which no
    root of the moment is needed (the released code shifts a moment that has no Cholesky factor).

    *What the whitened form comes to*: `W_g^T S S^T W_g` is the second moment of the keys, so on the same text it gives the
    bases of `Eigen` under the same sharing. Palu's groups of heads are `joint`, its
    per-head form is `head`. Its ranks, shares of Fisher information rounded to 32, are not ported: plans are made as for
    every method.

    Keys must be a linear map of the layer's input. A bias is refused, because Palu adds it after the rebuilding and a basis
    has no constant; so are norms of the keys (Qwen3) and keys after RoPE.
    """

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        """See `Method`.

        Raises:
            UnsupportedModel: keys or values are not a linear map of the layer's input.
        """
        moment = _input_moment(view)
        squares: dict[str, Tensor] = {}
        for name in ("key", "value"):
            weight = _projection(view, name).weight.detach().double()
            product = weight @ moment @ weight.T
            seen = getattr(view.moments, name)
            if float((product - seen).norm()) > _LINEAR * float(seen.norm()):
                raise UnsupportedModel(
                    f"method 'palu' needs {name}s that are a linear map of the layer's input; in layer {view.index} a norm, "
                    f"a clip or RoPE stands between the projection and the cache"
                )
            squares[name] = product if self.whitened else weight @ weight.T
        moments = replace(view.moments, key=squares["key"], value=squares["value"])
        return Eigen().fit(replace(view, moments=moments), sharing, seed)


def _projection(view: LayerView, name: str) -> nn.Linear:
    attention = view.seam.modules[view.index]
    projections = architecture_of(view.seam.model.config).projections
    if len(projections) != len(("key", "value")):
        raise UnsupportedModel(
            f"method 'palu' needs a projection of the {name}s of its own, not {projections[0]}"
        )
    path = projections[name == "value"]
    found = attention.get_submodule(path)
    if not isinstance(found, nn.Linear) or found.out_features != view.geometry.kv_width:
        raise UnsupportedModel(
            f"method 'palu' needs {path} to make the {name}s of all KV heads and nothing else"
        )
    if found.bias is not None:
        raise UnsupportedModel(
            f"method 'palu' needs {name}s that are a linear map of the layer's input; {path} of layer {view.index} adds a bias"
        )
    return found


@torch.no_grad()
def _input_moment(view: LayerView) -> Tensor:
    """Second moment of what the projections read, `[hidden, hidden]`, float64, on the model's device."""
    projection = _projection(view, "key")
    shape = (projection.in_features, projection.in_features)
    total = torch.zeros(shape, dtype=torch.float64, device=view.walk.device)

    def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].reshape(-1, projection.in_features).double()
        total.add_(rows.T @ rows)

    handle = projection.register_forward_pre_hook(observe)
    try:
        for batch in view.walk.batches(view.fitted_count):
            view.walk.forward(view.index, view.walk.inputs[batch], range(view.fitted_count)[batch])
    finally:
        handle.remove()
    return total / view.moments.tokens
