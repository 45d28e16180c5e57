"""Words that a user may give, as types and as tuples to check against. No computation, nothing to import."""

from __future__ import annotations

from typing import Literal, get_args

# Whether keys are cached before or after rotary embedding.
KeyMode = Literal["pre", "post"]
KEY_MODES: tuple[KeyMode, ...] = get_args(KeyMode)

# Which heads of a layer share a basis.
Sharing = Literal["head", "tied", "pair", "quad", "joint"]
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
# What a fit is asked for: `auto` chooses layer by layer (`orthokv.fit.grouping`).
SharingChoice = Literal["head", "tied", "pair", "quad", "joint", "auto"]
SHARING_CHOICES: tuple[SharingChoice, ...] = get_args(SharingChoice)
# KV heads in a group, where that is not all of them.
GROUP_HEADS = {"head": 1, "tied": 1, "pair": 2, "quad": 4}

# How ranks are chosen within a budget (`orthokv.planning.allocate`).
Allocation = Literal["knapsack", "greedy", "uniform", "pareto", "threshold"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)

# What a checkpoint holds: the bases alone, or the base model's files as well.
Form = Literal["adapter", "full"]
FORMS: tuple[Form, ...] = get_args(Form)

# How latents are stored (`orthokv.spec.codec`).
CodecName = Literal["16-bit", "native"]
CODECS: tuple[CodecName, ...] = get_args(CodecName)

# Methods that fit bases (`orthokv.spec.methods`).
MethodName = Literal["oblique", "stiefel", "weighted", "eigen", "palu"]

Parameterisation = Literal["direct", "predictor"]
# Where a learned orthonormal basis starts.
Start = Literal["eigen", "weighted", "random"]
# How a step comes back to the manifold (`orthokv.bases.manifold`).
Retraction = Literal["cholesky", "qr", "polar"]
# Which moments EigenAttention's bases come from: keys alone, or keys stacked with the queries that read them.
Statistics = Literal["k", "kq"]

# Dtypes that a base model may be loaded in; its weights are recognised in each.
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
