"""A method of your own in thirty lines: EigenAttention's bases, with the queries that read the keys weighed in.

A method sees one layer at a time and returns bases of full rank whose columns are in order of importance.
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import orthokv
from orthokv.bases.basis import orthonormal
from orthokv.fit.methods.base import FittedBases, descending_eigh, grouped_moment, query_moment
from orthokv.fit.task import LayerView
from orthokv.spec.methods import MethodSettings
from orthokv.spec.vocabulary import Sharing


@orthokv.register_method
@dataclass(frozen=True)
class Read(MethodSettings):
    """Singular vectors of keys stacked with `weight` times the queries that read them, at equal energy."""

    name: ClassVar[str] = "read"
    weight: float = 0.3

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        key = unit(grouped_moment(view, sharing, "key")) + self.weight * unit(query_moment(view, sharing))
        vectors = [descending_eigh(moment)[1] for moment in (key, grouped_moment(view, sharing, "value"))]
        heads, head_dim = view.geometry.kv_heads, view.geometry.head_dim
        return FittedBases(*(orthonormal(one.float(), heads, head_dim) for one in vectors), history={})


def unit(moment: Tensor) -> Tensor:
    return moment / moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo/demo-llama-3m")
parser.add_argument("--dataset", default="README.md")
parser.add_argument("--out", default="out/examples/method")
given = parser.parse_args()

quick = {"num_samples": 8, "sequence_length": 128}
for method, options in (("eigen", {}), ("read", {}), ("read", {"weight": 1.0})):
    out = "-".join([given.out, method, *map(str, options.values())])
    made = orthokv.compress(
        given.model, given.dataset, kept=0.25, out=out, method=method, options=options, **quick
    )
    print(f"{out}: KL {made.measured['kl']:.4f} nats on held-out text")
