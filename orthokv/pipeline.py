"""From a model and text to a checkpoint: the one way in, as steps that can also run apart.

`compress` runs all of them in this process. The service runs the same functions as separate, resumable steps: blocks,
layers one by one, the profile, a checkpoint, its evaluation.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from orthokv.checkpoint.read import Checkpoint
from orthokv.checkpoint.write import record_measurements, write_checkpoint
from orthokv.files.folders import refuse_taken
from orthokv.fit.grouping import fit_layer
from orthokv.fit.measuring import measure_layer, spread_blocks
from orthokv.fit.methods import method_of
from orthokv.fit.polish import polish
from orthokv.fit.refine import Refinement, can_refine, refine, watched_texts
from orthokv.fit.sensitivity import sensitivities
from orthokv.fit.task import LayerTask, view_layer
from orthokv.fit.walk import LayerWalk
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.measure.quality import quality
from orthokv.models.fingerprint import weight_fingerprints
from orthokv.models.geometry import geometry_of
from orthokv.models.loading import load, read_geometry
from orthokv.models.source import ModelSource, load_tokenizer
from orthokv.models.streaming import Streaming, streamed_weights
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import on_model, planned_bases
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.planning.search import allocate_for_perplexity
from orthokv.runtime.seam import Seam
from orthokv.spec.check import calibrated_positions, check
from orthokv.spec.codec import codec_spec
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.progress import Reporter, Step, counter, silent
from orthokv.spec.records import method_record
from orthokv.spec.settings import FitSettings
from orthokv.spec.sharing import sharings_of
from orthokv.spec.target import Target
from orthokv.text.blocks import Blocks
from orthokv.text.packing import load_blocks
from orthokv.text.source import TextMixture, TextSource
from orthokv.text.written import self_text

log = logging.getLogger("orthokv")


def prepare_blocks(
    source: ModelSource,
    text: TextSource | TextMixture,
    settings: FitSettings,
    model: PreTrainedModel | None = None,
    report: Reporter = silent,
) -> Blocks:
    """Calibration blocks, held-out ones included, from text, from the model itself, or from several of these.

    Where bases depend on positions, the blocks begin all over `calibrated_positions`. The starts go with the blocks:
    into their file, and through it to every later step, wherever that runs.
    """
    positions = calibrated_positions(read_geometry(source), settings)
    blocks = _read_blocks(source, text, settings, model, report)
    return blocks.spread(positions, settings.holdout)


def _read_blocks(
    source: ModelSource,
    text: TextSource | TextMixture,
    settings: FitSettings,
    model: PreTrainedModel | None,
    report: Reporter,
) -> Blocks:
    if isinstance(text, TextMixture):
        shares = text.shares(settings.num_samples)
        parts = [
            _read_blocks(source, part, replace(settings, num_samples=share), model, report)
            for part, share in zip(text.parts, shares, strict=True)
        ]
        return Blocks.of(
            torch.cat([part.tokens for part in parts]), " + ".join(part.source for part in parts)
        )
    if text.resolved_format() == "self":
        model = model if model is not None else load(source)
        if streamed_weights(model) is not None:
            raise InvalidSetting(
                f"{source.id} is streamed from disk and would be read once a token to write its own text: name a data set"
            )
        return self_text(
            model,
            num_samples=settings.num_samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            progress=counter(report, "sampling", "tokens"),
        )
    blocks = load_blocks(
        text,
        load_tokenizer(source),
        num_samples=settings.num_samples,
        sequence_length=settings.sequence_length,
        max_positions=read_geometry(source).max_positions,
    )
    if text.resolved_format() == "hub":
        return blocks
    # The name goes into every checkpoint; the folders above it are nobody's business, and differ between machines.
    return replace(blocks, source=Path(blocks.source).name)


def fit_layers(
    model: PreTrainedModel,
    blocks: Blocks,
    settings: FitSettings,
    layers: Iterable[int] | None = None,
    report: Reporter = silent,
) -> Iterator[LayerProfile]:
    """Fit layers one by one, in order, each on what the uncompressed layers before it produce (but see `propagate`).

    Args:
        layers: which ones; the others are only run through. A layer's result does not depend on which others are fitted.

    Raises:
        InvalidSetting: there is no such layer, `propagate` is set and a layer before a wanted one is not fitted, the KV
            heads do not divide into the groups of `sharing`, or the blocks do not cover the `positions` that are set
            (`prepare_blocks` sees to it).
    """
    geometry = geometry_of(model.config)
    sharings_of(settings.sharing, geometry)
    wanted = sorted(set(range(geometry.layers) if layers is None else layers))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < geometry.layers:
        raise InvalidSetting(f"layers {wanted} are outside 0..{geometry.layers - 1}")
    if settings.propagate is not None and wanted != list(range(len(wanted))):
        raise InvalidSetting(
            f"propagate needs all layers before a layer to be fitted in the same run; layers {wanted} leave some out"
        )
    if settings.positions not in (None, blocks.positions):
        raise InvalidSetting(
            f"positions {settings.positions} are to be served, but the blocks reach {blocks.positions}"
        )
    method = method_of(settings.method_settings)
    fitting, held_out = blocks.split(settings.holdout)
    report(Step("fitting", 0, len(wanted), "layers"))
    with Seam(model, settings.key_mode) as seam:
        # Held-out blocks go along, behind the others, so that errors can be measured on them too.
        walk = _walk(model, fitting, held_out, settings)
        for index in range(wanted[-1] + 1 if wanted else 0):
            if index in wanted:
                view = view_layer(walk, seam, index, len(fitting))
                # The seed of a layer is its own, so that a resumed fit continues exactly as an unbroken one.
                seed = settings.seed * 100_003 + index
                fitted = fit_layer(method, view, settings.sharing, seed, settings.profile_samples)
                yield fitted
                report(Step("fitting", wanted.index(index) + 1, len(wanted), "layers"))
                if settings.propagate is not None:
                    ranks = [max(1, round(settings.propagate * b.width)) for b in (fitted.key, fitted.value)]
                    seam.set_bases(index, on_model(model, fitted.bases(*ranks)))
                    walk.run(index)
                    seam.set_bases(index, None)
            else:
                walk.run(index)
            walk.advance()


def _walk(model: PreTrainedModel, first: Blocks, second: Blocks, settings: FitSettings) -> LayerWalk:
    tokens = torch.cat([first.tokens, second.tokens])
    return LayerWalk(model, tokens, settings.batch_size, first.starts + second.starts)


def build_profile(
    model: PreTrainedModel,
    source: ModelSource,
    blocks: Blocks,
    layers: Sequence[LayerProfile],
    settings: FitSettings,
    report: Reporter = silent,
) -> ErrorProfile:
    """Put fitted layers together and measure how much the model's predictions depend on each."""
    geometry = geometry_of(model.config)
    profile = ErrorProfile(
        geometry=geometry,
        key_mode=settings.key_mode,
        sharing=settings.sharing,
        layers=tuple(sorted(layers, key=lambda layer: layer.index)),
        model={
            # A local folder by its full path: a relative one would be another folder, or a hub id, elsewhere.
            "id": source.id if source.revision is not None else str(source.folder),
            "revision": source.revision,
            "digest": source.digest,
            "fingerprints": weight_fingerprints(model),
        },
        dataset={
            "source": blocks.source,
            "digest": blocks.digest,
            "num_samples": len(blocks),
            "sequence_length": int(blocks.tokens.shape[1]),
            "positions": blocks.positions,
            "held_out": settings.holdout,
        },
        method=method_record(settings.method_settings, settings.propagate),
        seed=settings.seed,
    )
    fitting, held_out = blocks.split(settings.holdout)
    profile = profile.with_sensitivities(sensitivities(model, profile, held_out, report))
    refinement = possible_refinement(model, settings)
    if refinement is None:
        if settings.refinement_steps:
            log.warning("no refinement: it needs the whole model, and %s is streamed from disk", source.id)
        return profile
    checks = [held_out, *watched_texts(model, blocks, settings.seed)]
    refined, _ = refine(model, profile, fitting, checks, refinement, settings.seed, report)
    measured = measure_errors(model, refined, blocks, settings, report)
    measured = replace(measured, method={**profile.method, "refine_steps": refinement.steps})
    return measured.with_sensitivities(sensitivities(model, measured, held_out, report))


def possible_refinement(model: PreTrainedModel, settings: FitSettings) -> Refinement | None:
    """The last stage that `settings` ask for; None also where it is only a method's default and the model is streamed.

    Raises:
        InvalidSetting: `refine_steps` asks for it and the model is streamed from disk.
    """
    steps = settings.refinement_steps
    return Refinement(steps) if can_refine(model, refine_steps=settings.refine_steps) and steps else None


def measure_errors(
    model: PreTrainedModel,
    profile: ErrorProfile,
    blocks: Blocks,
    settings: FitSettings,
    report: Reporter = silent,
) -> ErrorProfile:
    """The profile with the errors of every layer measured anew, on the same blocks as after the fit."""
    layers: list[LayerProfile] = []
    fitting, held_out = blocks.split(settings.holdout)
    chosen = fitting.take(spread_blocks(len(fitting), settings.profile_samples))
    with Seam(model, profile.key_mode) as seam:
        walk = _walk(model, chosen, held_out, settings)
        for layer in profile.layers:
            walk.run(layer.index)
            task = LayerTask(layer.index, walk, seam, len(chosen))
            measured = measure_layer(task, layer, settings.profile_samples, layer.sharing)
            layers.append(replace(measured, candidates=layer.candidates))
            walk.advance()
            report(Step("measuring", layer.index + 1, len(profile.layers), "layers"))
    return replace(profile, layers=tuple(layers))


@dataclass(frozen=True)
class Reached:
    """Relative increase of perplexity on the held-out blocks, and its 95 % upper bound for other text of their kind."""

    increase: float
    bound: float


def make_plan(
    profile: ErrorProfile,
    target: Target,
    *,
    model: PreTrainedModel | None = None,
    held_out: Blocks | None = None,
    report: Reporter = silent,
) -> tuple[Plan, Reached | None]:
    """Ranks for a target, and what was reached where its budget is a perplexity increase.

    Such a budget is a promise about text that nobody has seen yet: it is the upper bound of the increase that must stay within
    it, not the increase on the held-out blocks, half of which would break the promise.

    Args:
        model: where codec `native` is asked for, also says how many bytes its numbers have; without it they count as 4.

    Raises:
        BudgetUnreachable: see `orthokv.planning.allocate.allocate`.
        InvalidSetting: a perplexity budget without a model and held-out blocks.
    """
    budget, grid = target.budget, target.grid
    codec = codec_spec(target.codec, 4 if model is None else model.dtype.itemsize)
    if budget.metric != "perplexity_increase":
        return allocate(profile, budget, target.allocation, grid, codec), None
    if model is None or held_out is None:
        raise InvalidSetting(
            "a perplexity_increase budget needs the model and held-out text to be checked on"
        )
    tried: dict[tuple[tuple[int, int], ...], Reached] = {}
    with Seam(model, profile.key_mode) as seam:

        def bound(plan: Plan) -> float:
            tried[plan.ranks] = _reached(seam, profile, plan, held_out)
            report(Step("planning", len(tried), max(len(tried), 9), "plans"))
            return tried[plan.ranks].bound

        plan, _ = allocate_for_perplexity(profile, budget, bound, grid, codec)
    return plan, tried[plan.ranks]


def _reached(seam: Seam, profile: ErrorProfile, plan: Plan, held_out: Blocks) -> Reached:
    found = quality(seam, planned_bases(seam.model, profile, plan), held_out)
    return Reached(found.increase, found.increase_bound)


def polish_plan(
    model: PreTrainedModel,
    profile: ErrorProfile,
    plan: Plan,
    reached: Reached | None,
    blocks: Blocks,
    steps: int | None = None,
    report: Reporter = silent,
) -> tuple[ErrorProfile, Reached | None]:
    """What a checkpoint of a plan is written from (`polish`), and what it reaches where the plan did.

    The profile's own bases are kept where polished ones would break the promise of a perplexity budget: the polish brings the
    predictions closer to the uncompressed model's, which is nearly always, but not always, a lower perplexity.
    """
    polished = polish(model, profile, plan, blocks, steps, report)
    if reached is None or polished is profile:
        return polished, reached
    _, held_out = blocks.split(profile.dataset["held_out"])
    with Seam(model, profile.key_mode) as seam:
        after = _reached(seam, polished, plan, held_out)
    if after.bound <= plan.budget.value:
        return polished, after
    log.warning(
        f"the polish is not taken: it would raise the bound of the perplexity's increase from {reached.bound:.4f} to "
        f"{after.bound:.4f}, above the budget of {plan.budget.value:g}"
    )
    return profile, reached


@dataclass(frozen=True)
class Compressed:
    """What a compression made.

    Attributes:
        checkpoint: as it was read back from its folder.
        profile: errors of every layer at every candidate rank, which serves other budgets as well.
        plan: the ranks that were chosen.
        measured: quality and bytes on the held-out blocks (`orthokv.measure.checkpoint.evaluate_checkpoint`).
        reached: of a `perplexity_increase` budget: the increase on the held-out blocks, and its bound for other text.
    """

    checkpoint: Checkpoint
    profile: ErrorProfile
    plan: Plan
    measured: dict[str, Any]
    reached: Reached | None


def compress(
    source: ModelSource,
    text: TextSource | TextMixture,
    target: Target,
    out: Path,
    settings: FitSettings | None = None,
    *,
    model: PreTrainedModel | None = None,
    device: str = "auto",
    streaming: Streaming = "auto",
    report: Reporter = silent,
) -> Compressed:
    """Fit, plan, polish, write a checkpoint to `out` and measure it on the held-out blocks.

    A model larger than the memory is streamed from disk (see `orthokv.models.loading.load`); long blocks of large models can be
    kept there too, with `orthokv.models.states.spilled_to` around the call.

    Args:
        model: of `source`, where it is loaded already; it is used where it lies.

    Raises:
        OrthoKVError: any of its kinds; nothing is left at `out`.
    """
    settings = settings or FitSettings()
    # What can be refused is refused before any weight is read.
    refuse_taken(out)
    check(read_geometry(source), settings, target)
    model = load(source, device, streaming=streaming) if model is None else model
    can_refine(model, refine_steps=settings.refine_steps, polish_steps=target.polish_steps)
    blocks = prepare_blocks(source, text, settings, model, report)
    layers = list(fit_layers(model, blocks, settings, report=report))
    profile = build_profile(model, source, blocks, layers, settings, report)
    _, held_out = blocks.split(settings.holdout)
    plan, reached = make_plan(profile, target, model=model, held_out=held_out, report=report)
    polished, reached = polish_plan(model, profile, plan, reached, blocks, target.polish_steps, report)
    checkpoint = write_checkpoint(profile, plan, out, form=target.form, base=source, polished=polished)
    try:
        measured = evaluate_checkpoint(model, checkpoint, held_out, report=report)
        record_measurements(out, measured)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Compressed(checkpoint, profile, plan, measured, reached)
