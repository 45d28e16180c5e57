"""EigenAttention (Saxena et al., Findings of EMNLP 2024, arXiv 2408.05646): singular vectors of the activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orthokv.bases.basis import Basis, orthonormal
from orthokv.fit.methods.base import FittedBases, descending_eigh, grouped_moment, query_moment
from orthokv.fit.task import LayerView
from orthokv.spec.methods import EigenSettings
from orthokv.spec.vocabulary import Sharing


@dataclass(frozen=True)
class Eigen(EigenSettings):
    """Bases from the singular vectors of keys and of values (not centred, as in the paper).


    The singular vectors come from the second moment (float64), which gives the same vectors as an SVD of the tall
    activation matrix with `width^2` numbers of memory. With `sharing="tied"` and `"k"` this is the released
    method for Llama, with `"head"` and `"kq"` the paper's; its rank rule is
    `orthokv.planning.published.threshold_ranks`. With `"head"` and `"k"` it is what the literature calls K-SVD.
    """

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        geometry = view.geometry
        key = grouped_moment(view, sharing, "key")
        if self.statistics == "kq":
            key = key + query_moment(view, sharing)
        value = grouped_moment(view, sharing, "value")
        key_values, key_vectors = descending_eigh(key)
        value_values, value_vectors = descending_eigh(value)

        def basis(vectors: Tensor) -> Basis:
            return orthonormal(vectors.float(), geometry.kv_heads, geometry.head_dim)

        return FittedBases(
            basis(key_vectors),
            basis(value_vectors),
            {},
            key_values.sqrt().float(),
            value_values.sqrt().float(),
        )
