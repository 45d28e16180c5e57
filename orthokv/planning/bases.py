"""The bases of a plan, ready to use on a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from orthokv.bases.basis import Bases
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.codecs import store_dtype


def on_model(model: PreTrainedModel, bases: Bases, codec: str = "native") -> Bases:
    """Bases in the model's dtype and on its device, storing latents as the codec says."""
    device, dtype = model.device, model.dtype
    return Bases(bases.key.to(device, dtype), bases.value.to(device, dtype), store_dtype(codec, dtype))


def planned_bases(model: PreTrainedModel, profile: ErrorProfile, plan: Plan) -> list[Bases]:
    """The bases of a plan, ready to use on a model."""
    pairs = zip(profile.layers, plan.layers, strict=True)
    return [on_model(model, layer.bases(*own.ranks), own.key.codec.name) for layer, own in pairs]
