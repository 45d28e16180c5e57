"""From a model and text to a checkpoint: the one way in, as steps that can also run apart.

``compress`` runs all of them in this process. The service runs the same functions as separate, resumable steps: blocks,
layers one by one, the profile, a checkpoint, its evaluation.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from orthokv.allocate import Allocation, Plan, allocate, allocate_for_perplexity, check_reachable
from orthokv.attention import Bases, Seam, seam_of
from orthokv.basis import KEY_MODES, SHARING_CHOICES, KeyMode, SharingChoice
from orthokv.budget import Budget
from orthokv.capture import LayerTask, LayerWalk, view_layer
from orthokv.checkpoint import Checkpoint, Form, record_measurements, write_checkpoint
from orthokv.codecs import DEFAULT_CODEC, store_dtype
from orthokv.dataset import Blocks, TextMixture, TextSource, evenly, load_blocks, self_text
from orthokv.errors import InvalidSetting
from orthokv.evaluate import (
    cache_size,
    quality,
    quality_by_layer,
    separate_divergences,
    tokens_per_second,
)
from orthokv.fingerprint import weight_fingerprints
from orthokv.geometry import AttentionGeometry, check_key_mode, check_positions
from orthokv.grouping import fit_layer, sharings_of
from orthokv.methods import make_method
from orthokv.polish import check_polish, polish
from orthokv.profile import ErrorProfile, LayerProfile, measure_layer, spread_blocks
from orthokv.progress import Reporter, Step, counter, silent
from orthokv.rankgrid import FREE, RankGrid
from orthokv.refine import Refinement, can_refine, check_steps, refine, watched_texts
from orthokv.repeatable import fix_workspaces
from orthokv.runtime.attach import attach, detach
from orthokv.source import ModelSource, load_config, load_model, load_tokenizer, resolve_device
from orthokv.streaming import Streaming, stream_model, streamed_weights, streaming_reason

log = logging.getLogger("orthokv")

# One block in eight is held out of the fit: for perplexity budgets, sensitivities and the checkpoint's own figures.
HOLDOUT_SHARE = 8
# Each layer's sensitivity is measured at about this share of its widths, where typical plans lie.
SENSITIVITY_SHARE = 0.25
SENSITIVITY_BLOCKS = 2


@dataclass(frozen=True)
class FitSettings:
    """Everything that a fit depends on besides the model and the text.

    Attributes:
        method: a key of :data:`orthokv.methods.METHODS`.
        sharing, key_mode: see :mod:`orthokv.basis`; ``auto`` fits every layer in several forms (:mod:`orthokv.grouping`).
        parameterisation, steps, epochs: settings of the method; None takes the method's default.
        refine_steps: steps of the last stage, all layers together (:mod:`orthokv.refine`); 0 leaves it out, None takes the
            method's default.
        options: other hyper-parameters of the method, by name.
        propagate: None fits every layer on what the *uncompressed* layers before it produce, so that layers are independent.
            A share of the widths in (0, 1] fits each on what the layers before it produce when they are cut to that share;
            layers can then only be fitted in order, by one worker.
        num_samples, sequence_length: calibration blocks, of which one in eight is held out.
        positions: key mode ``post`` only, whose bases depend on absolute positions: the blocks are spread over
            ``0..positions - 1``, which should be what the checkpoint will serve; None: the model's longest context
            (``docs/decisions/0010-positions-after-rope.md``).
        seed: of everything random.
        profile_samples: blocks on which the error surface is measured.
        batch_size: blocks in one forward of a layer.
    """

    method: str = "oblique"
    sharing: SharingChoice = "joint"
    key_mode: KeyMode = "pre"
    parameterisation: str | None = None
    steps: int | None = None
    epochs: int | None = None
    refine_steps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    propagate: float | None = None
    num_samples: int = 64
    sequence_length: int = 1024
    positions: int | None = None
    seed: int = 0
    profile_samples: int = 2
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.sharing not in SHARING_CHOICES:
            raise InvalidSetting(f"sharing must be one of {', '.join(SHARING_CHOICES)}, not {self.sharing!r}")
        if self.key_mode not in KEY_MODES:
            raise InvalidSetting(f"key mode must be one of {', '.join(KEY_MODES)}, not {self.key_mode!r}")
        if self.num_samples < 2:
            raise InvalidSetting(f"num_samples must be at least 2 (one is held out), not {self.num_samples}")
        for name in ("profile_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.positions is not None and self.key_mode != "post":
            raise InvalidSetting(
                f"positions {self.positions} has no effect in key mode {self.key_mode!r}: bases of keys before RoPE "
                f"are the same at every position"
            )
        if self.positions is not None and self.positions < self.sequence_length:
            raise InvalidSetting(
                f"positions must be at least sequence_length ({self.sequence_length}), not {self.positions}"
            )
        if self.propagate is not None and not 0 < self.propagate <= 1:
            raise InvalidSetting(f"propagate must be a share of the widths in (0, 1], not {self.propagate:g}")
        self.make_method()
        check_steps("refine_steps", self.refine_steps)

    def make_method(self) -> Any:
        """The method with its hyper-parameters; :class:`InvalidSetting` where it does not have one that was given."""
        own = {"parameterisation": self.parameterisation, "steps": self.steps, "epochs": self.epochs}
        return make_method(self.method, **{**own, **self.options})

    @property
    def refinement(self) -> Refinement | None:
        steps = self.make_method().refine_steps if self.refine_steps is None else self.refine_steps
        return Refinement(steps) if steps else None

    @property
    def holdout(self) -> int:
        return max(1, self.num_samples // HOLDOUT_SHARE)


# ----------------------------------------------------------------------------------------------- the steps


def load(
    source: ModelSource,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    streaming: Streaming = "auto",
) -> PreTrainedModel:
    """The model for calibration and evaluation: float32 on a CPU, whose 16-bit arithmetic is slow and coarse.

    Where it does not fit (``streaming="auto"``) or is asked for (``"on"``), its decoder layers stay on disk until they are
    called, which is said in one line to the logger. Results are the same.
    """
    target = resolve_device(device)
    if target.type == "cuda":
        fix_workspaces()
    if dtype is None and target.type == "cpu":
        dtype = torch.float32
    reason = streaming_reason(source, target, dtype, streaming)
    if reason is None:
        return load_model(source, dtype=dtype, device=str(target))
    log.warning(reason)
    return stream_model(source, dtype=dtype, device=str(target))


def read_geometry(source: ModelSource) -> AttentionGeometry:
    """The geometry of a model on disk, from its configuration alone.

    Raises:
        UnsupportedModel: see :meth:`AttentionGeometry.from_config`.
    """
    return AttentionGeometry.from_config(load_config(source))


def calibrated_positions(geometry: AttentionGeometry, settings: FitSettings) -> int:
    """The positions that calibration blocks cover, from 0: one block's, but in key mode ``post`` those to be served.

    Raises:
        InvalidSetting: see :func:`~orthokv.geometry.check_positions`.
    """
    if settings.positions is not None:
        check_positions(geometry, settings.positions)
        return settings.positions
    if settings.key_mode == "post" and geometry.rope is not None:
        return geometry.max_positions
    return settings.sequence_length


def prepare_blocks(
    source: ModelSource,
    text: TextSource | TextMixture,
    settings: FitSettings,
    model: PreTrainedModel | None = None,
    report: Reporter = silent,
) -> Blocks:
    """Calibration blocks, held-out ones included, from text, from the model itself, or from several of these.

    Where bases depend on positions, the blocks begin all over :func:`calibrated_positions`. The starts go with the blocks:
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
    """Fit layers one by one, in order, each on what the uncompressed layers before it produce (but see ``propagate``).

    Args:
        layers: which ones; the others are only run through. A layer's result does not depend on which others are fitted.

    Raises:
        InvalidSetting: there is no such layer, ``propagate`` is set and a layer before a wanted one is not fitted, the KV
            heads do not divide into the groups of ``sharing``, or the blocks do not cover the ``positions`` that are set
            (:func:`prepare_blocks` sees to it).
    """
    geometry = AttentionGeometry.from_config(model.config)
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
    method = settings.make_method()
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
                    seam.set_bases(index, _on(model, fitted.bases(*ranks)))
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
    geometry = AttentionGeometry.from_config(model.config)
    method = settings.make_method()
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
        method={
            "name": method.name,
            **asdict(method),
            "refine_steps": 0,
            **({} if settings.propagate is None else {"propagate": settings.propagate}),
        },
        seed=settings.seed,
    )
    fitting, held_out = blocks.split(settings.holdout)
    profile = profile.with_sensitivities(sensitivities(model, profile, held_out, report))
    refinement = possible_refinement(model, settings)
    if refinement is None:
        if settings.refinement is not None:
            log.warning("no refinement: it needs the whole model, and %s is streamed from disk", source.id)
        return profile
    checks = [held_out, *watched_texts(model, blocks, settings.seed)]
    refined, _ = refine(model, profile, fitting, checks, refinement, settings.seed, report)
    measured = measure_errors(model, refined, blocks, settings, report)
    measured = replace(measured, method={**profile.method, "refine_steps": refinement.steps})
    return measured.with_sensitivities(sensitivities(model, measured, held_out, report))


def possible_refinement(model: PreTrainedModel, settings: FitSettings) -> Refinement | None:
    """The last stage that ``settings`` ask for; None also where it is only a method's default and the model is streamed.

    Raises:
        InvalidSetting: ``refine_steps`` asks for it and the model is streamed from disk.
    """
    return settings.refinement if can_refine(model, refine_steps=settings.refine_steps) else None


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


def sensitivities(
    model: PreTrainedModel, profile: ErrorProfile, blocks: Blocks, report: Reporter = silent
) -> list[float]:
    """KL divergence of the predictions per squared error of each layer, with only that layer compressed.

    The error in the denominator is the profile's own at the same ranks, so that ``sensitivity * error^2`` reproduces the
    measured divergence there.
    """
    points = [_sensitivity_point(layer) for layer in profile.layers]
    bases = [
        _on(model, layer.bases(layer.ranks_key[a], layer.ranks_value[b]))
        for layer, (a, b) in zip(profile.layers, points, strict=True)
    ]
    some = blocks.take(evenly(len(blocks), SENSITIVITY_BLOCKS))
    with Seam(model, profile.key_mode) as seam:
        found = separate_divergences(seam, bases, some, report)
    return [
        max(kl, 0.0) / max(float(layer.error[a, b]) ** 2, 1e-12)
        for kl, layer, (a, b) in zip(found, profile.layers, points, strict=True)
    ]


def _sensitivity_point(layer: LayerProfile) -> tuple[int, int]:
    """Indices of the candidate ranks closest to :data:`SENSITIVITY_SHARE` of the widths."""

    def closest(ranks: tuple[int, ...]) -> int:
        return min(range(len(ranks)), key=lambda i: abs(ranks[i] / ranks[-1] - SENSITIVITY_SHARE))

    return closest(layer.ranks_key), closest(layer.ranks_value)


def _on(model: PreTrainedModel, bases: Bases, codec: str = "native") -> Bases:
    """Bases in the model's dtype and on its device, storing latents as the codec says."""
    assert bases.key is not None
    assert bases.value is not None
    device, dtype = model.device, model.dtype
    return Bases(bases.key.to(device, dtype), bases.value.to(device, dtype), store_dtype(codec, dtype))


def planned_bases(
    model: PreTrainedModel, profile: ErrorProfile, plan: Plan, codec: str = DEFAULT_CODEC
) -> list[Bases]:
    """The bases of a plan, ready to use on a model."""
    pairs = zip(profile.layers, plan.ranks, strict=True)
    return [_on(model, layer.bases(*ranks), codec) for layer, ranks in pairs]


@dataclass(frozen=True)
class Reached:
    """Relative increase of perplexity on the held-out blocks, and its 95 % upper bound for other text of their kind."""

    increase: float
    bound: float


def make_plan(
    profile: ErrorProfile,
    budget: Budget,
    allocation: Allocation = "knapsack",
    *,
    grid: RankGrid = FREE,
    model: PreTrainedModel | None = None,
    held_out: Blocks | None = None,
    report: Reporter = silent,
) -> tuple[Plan, Reached | None]:
    """Ranks for a budget, and what was reached where the budget is a perplexity increase.

    Such a budget is a promise about text that nobody has seen yet: it is the upper bound of the increase that must stay within
    it, not the increase on the held-out blocks, half of which would break the promise.

    Raises:
        BudgetUnreachable: see :func:`orthokv.allocate.allocate`.
        InvalidSetting: a perplexity budget without a model and held-out blocks.
    """
    if budget.metric != "perplexity_increase":
        return allocate(profile, budget, allocation, grid), None
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

        plan, _ = allocate_for_perplexity(profile, budget, bound, grid)
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
    """What a checkpoint of a plan is written from (:func:`~orthokv.polish.polish`), and what it reaches where the plan did.

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


def evaluate_checkpoint(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    blocks: Blocks,
    *,
    speed: bool = False,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Attach a checkpoint, measure it against the same model without it, and detach.

    Predictions and layers are measured where the blocks begin (:meth:`~orthokv.dataset.Blocks.placed`), which in key mode
    ``post`` matters; bytes and speed do not depend on it.

    Returns:
        ``perplexity``, ``perplexity_dense``, ``kl`` (nats a token), ``kept``, ``cache_bytes_per_token``,
        ``cache_bytes_per_token_dense``, ``tokens``, ``layer_error`` and ``layer_cosine`` by layer, ``dataset``; with ``speed``
        also ``tokens_per_second``, ``tokens_per_second_dense`` and ``device``, but not of a model that is streamed from disk:
        it would be the disk's speed.
    """
    attach(model, checkpoint)
    try:
        seam = seam_of(model)
        assert seam is not None
        bases = [state for i in range(len(seam.modules)) if (state := seam.state(i).bases) is not None]
        found, layers = quality_by_layer(seam, bases, blocks, report)
        size = cache_size(seam, bases, blocks.tokens[0])
        measured: dict[str, Any] = {
            "perplexity": found.perplexity,
            "perplexity_dense": found.perplexity_dense,
            "kl": found.kl,
            "kept": size.kept,
            "cache_bytes_per_token": size.bytes_per_token,
            "cache_bytes_per_token_dense": size.bytes_per_token_dense,
            "tokens": found.tokens,
            "layer_error": [layer.error for layer in layers],
            "layer_cosine": [layer.cosine for layer in layers],
            "dtype": str(model.dtype).removeprefix("torch."),
            "dataset": {
                "source": blocks.source,
                "digest": blocks.digest,
                "num_samples": len(blocks),
                "sequence_length": int(blocks.tokens.shape[1]),
                "starts": sorted(set(blocks.starts)),
            },
        }
        if speed and streamed_weights(model) is None:
            prompt = blocks.tokens[0][: max(2, blocks.tokens.shape[1] // 2)]
            measured["tokens_per_second"], measured["tokens_per_second_dense"] = tokens_per_second(
                seam, bases, prompt
            )
            measured["device"] = device_name(model.device)
        return measured
    finally:
        detach(model)


def device_name(device: torch.device) -> str:
    """What a measurement says it ran on."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


# ------------------------------------------------------------------------------------------------- one way in


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` made."""

    checkpoint: Checkpoint
    profile: ErrorProfile
    plan: Plan
    measured: dict[str, Any]
    reached: Reached | None


def compress(
    source: ModelSource,
    text: TextSource | TextMixture,
    budget: Budget,
    out: Path,
    settings: FitSettings | None = None,
    *,
    grid: RankGrid = FREE,
    form: Form = "adapter",
    polish_steps: int | None = None,
    device: str = "auto",
    streaming: Streaming = "auto",
    report: Reporter = silent,
) -> Compressed:
    """Fit, plan, polish, write a checkpoint to ``out`` and measure it on the held-out blocks.

    A model larger than the memory is streamed from disk (see :func:`load`); long blocks of large models can be kept there
    too, with :func:`orthokv.capture.spilled_to` around the call.

    Args:
        polish_steps: see :func:`orthokv.polish.polish`; 0: the checkpoint has the profile's own bases.

    Raises:
        OrthoKVError: any of its kinds; nothing is left at ``out``.
    """
    settings = settings or FitSettings()
    geometry = read_geometry(source)
    # What can be refused is refused before any weight is read.
    check_key_mode(geometry, settings.key_mode)
    calibrated_positions(geometry, settings)
    check_reachable(geometry, settings.sharing, settings.key_mode, budget, grid)
    check_polish(budget, polish_steps)
    model = load(source, device, streaming=streaming)
    can_refine(model, refine_steps=settings.refine_steps, polish_steps=polish_steps)
    blocks = prepare_blocks(source, text, settings, model, report)
    layers = list(fit_layers(model, blocks, settings, report=report))
    profile = build_profile(model, source, blocks, layers, settings, report)
    _, held_out = blocks.split(settings.holdout)
    plan, reached = make_plan(profile, budget, grid=grid, model=model, held_out=held_out, report=report)
    polished, reached = polish_plan(model, profile, plan, reached, blocks, polish_steps, report)
    checkpoint = write_checkpoint(profile, plan, out, form=form, base=source, polished=polished)
    try:
        measured = evaluate_checkpoint(model, checkpoint, held_out, report=report)
        record_measurements(out, measured)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Compressed(checkpoint, profile, plan, measured, reached)
