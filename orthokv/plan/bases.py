"""The bases of a plan, ready to use on a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from orthokv.bases.basis import Bases
from orthokv.plan.plan import Plan
from orthokv.plan.profile import ErrorProfile
from orthokv.runtime.codecs import DEFAULT_CODEC


def on_model(model: PreTrainedModel, bases: Bases, codec: str = "native") -> Bases:
    """Bases in the model's dtype and on its device, storing latents as the codec says."""
    assert bases.key is not None
    assert bases.value is not None
    device, dtype = model.device, model.dtype
    return Bases(bases.key.to(device, dtype), bases.value.to(device, dtype), codec)


def planned_bases(
    model: PreTrainedModel, profile: ErrorProfile, plan: Plan, codec: str = DEFAULT_CODEC
) -> list[Bases]:
    """The bases of a plan, ready to use on a model."""
    pairs = zip(profile.layers, plan.ranks, strict=True)
    return [on_model(model, layer.bases(*ranks), codec) for layer, ranks in pairs]
