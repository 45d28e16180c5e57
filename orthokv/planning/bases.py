"""The bases of a plan, ready to use on a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from orthokv.bases.basis import NATIVE, Bases
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile


def on_model(model: PreTrainedModel, bases: Bases, codecs: tuple[str, str] = NATIVE) -> Bases:
    """Bases in the model's dtype and on its device, storing latents as the codecs of keys and of values say."""
    device, dtype = model.device, model.dtype
    return Bases(bases.key.to(device, dtype), bases.value.to(device, dtype), codecs)


def planned_bases(model: PreTrainedModel, profile: ErrorProfile, plan: Plan) -> list[Bases]:
    """The bases of a plan, ready to use on a model."""
    pairs = zip(profile.layers, plan.layers, strict=True)
    return [
        on_model(model, layer.bases(*own.ranks), (own.key.codec.name, own.value.codec.name))
        for layer, own in pairs
    ]
