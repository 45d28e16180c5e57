"""The verbs of the library, as `import orthokv` gives them: ids, paths or a loaded model in, a checkpoint out.

Each opens what it was given, makes the library's own values of it and calls what the command line calls, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from orthokv.checkpoint.read import Checkpoint, read_checkpoint
from orthokv.checkpoint.write import write_checkpoint
from orthokv.files.folders import refuse_taken
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.models.loaded import borrowed, source_of
from orthokv.models.loading import load, read_geometry
from orthokv.models.source import ModelSource, load_tokenizer, recorded_model, resolve_model
from orthokv.models.states import spilled_to
from orthokv.models.streaming import Streaming
from orthokv.pipeline import Compressed, make_plan
from orthokv.pipeline import compress as run
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import seam_of
from orthokv.serving.attach import locate
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.geometry import check_positions
from orthokv.spec.progress import Reporter, silent
from orthokv.spec.records import BaseModel
from orthokv.spec.settings import FitSettings, default_length
from orthokv.spec.target import Target
from orthokv.text.packing import load_blocks
from orthokv.text.source import TextMixture, TextSource, needs_text, text_of

Model = str | Path | ModelSource | PreTrainedModel
Dataset = str | Path | TextSource | TextMixture | Sequence[str | Path | TextSource]
T = TypeVar("T")


def compress(
    model: Model,
    dataset: Dataset,
    *,
    out: str | Path,
    kept: float | None = None,
    layer_error: float | None = None,
    perplexity_increase: float | None = None,
    settings: FitSettings | None = None,
    target: Target | None = None,
    field: str = "text",
    revision: str | None = None,
    device: str = "auto",
    streaming: Streaming = "auto",
    spill: str | Path | None = None,
    report: Reporter = silent,
    **choices: Any,
) -> Compressed:
    """Fit bases to a model, choose ranks within one budget, write a checkpoint and measure it on held-out text.

    Args:
        model: a folder, a hub id, or a model that `from_pretrained` has loaded, which is used where it lies and left as it
            was. Weights are safetensors; code and pickles are never loaded.
        dataset: calibration text: a file (JSONL, plain text, Parquet), a hub data set id, `"self"` (the model writes its own),
            a `TextSource`, or a list of these, mixed in equal parts.
        out: a folder that does not exist yet.
        kept: budget: stored bytes over the bytes of the 16-bit cache, in (0, 1].
        layer_error: budget: the relative error of every decoder layer's output.
        perplexity_increase: budget: perplexity over the uncompressed model's, minus 1, as a 95 % bound for text like the
            held-out blocks.
        settings: of the fit, instead of its fields as keywords.
        target: budget and form of the checkpoint, instead of a budget and the fields of `Target` as keywords.
        field: of a row of text, where the dataset is given by its name.
        revision: commit, tag or branch of a hub model.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; a loaded model stays on its own.
        streaming: one decoder layer at a time from disk: `on`, `off`, or `auto` (where memory is short).
        spill: a folder for hidden states, which otherwise stay in memory.
        report: called with each step of progress.
        choices: fields of `FitSettings` and of `Target` by name, such as `method="eigen"`, `num_samples=128` or `form="full"`.
            Without `sequence_length` a block has 1024 tokens, or the model's longest context where that is shorter.

    Returns:
        The checkpoint, its profile, the plan and what was measured.

    Raises:
        InvalidSetting: no budget or several, an unknown keyword, or a value out of range.
        BudgetUnreachable: no plan meets the budget.
        OrthoKVError: a model, a text or a disk that cannot be used. Nothing is left at `out`.
    """
    _refuse_unknown(compress, choices, FitSettings, Target)
    _refuse_both("settings", settings, choices, FitSettings)
    target = _target(
        target,
        {"kept": kept, "layer_error": layer_error, "perplexity_increase": perplexity_increase},
        choices,
    )
    out = Path(out)
    refuse_taken(out)
    _check_spill(spill)
    with _opened(model, revision, device, streaming) as (source, loaded):
        settings = _settings(choices, source) if settings is None else settings
        with spilled_to(None if spill is None else Path(spill)):
            return run(
                source,
                text_of(dataset, field),
                target,
                out,
                settings,
                model=loaded,
                device=device,
                streaming=streaming,
                report=report,
            )


def plan(
    profile: str | Path | ErrorProfile,
    *,
    out: str | Path | None = None,
    kept: float | None = None,
    layer_error: float | None = None,
    target: Target | None = None,
    model: str | Path | ModelSource | None = None,
    revision: str | None = None,
    **choices: Any,
) -> Plan:
    """Choose ranks for another budget from a stored profile: seconds, without a fit, a polish or the model.

    Args:
        profile: a folder with a profile, which every checkpoint has, or a profile that was read.
        out: a folder that does not exist yet, for a checkpoint of the profile's own bases; None writes none.
        kept: budget: stored bytes over the bytes of the 16-bit cache, in (0, 1].
        layer_error: budget: the relative error of every decoder layer's output.
        target: budget and form, instead of a budget and the fields of `Target` as keywords.
        model: the base model's files, for `form="full"`; None: the model that the profile names, at its commit.
        revision: of that model, where it is a hub model.
        choices: fields of `Target` by name, such as `grid=RankGrid(16)`, `allocation="uniform"` or `form="full"`.

    Returns:
        Ranks of every layer, the bytes that they take and the errors to be expected.

    Raises:
        InvalidSetting: no budget or several, an unknown keyword, or a value out of range.
        BudgetUnreachable: no ranks meet the budget.
        InvalidCheckpoint: the profile is truncated or was altered.
    """
    _refuse_unknown(plan, choices, Target)
    target = _target(target, {"kept": kept, "layer_error": layer_error}, choices)
    if out is not None:
        refuse_taken(Path(out))
    found = profile if isinstance(profile, ErrorProfile) else load_profile(profile)
    chosen, _ = make_plan(found, target)
    if out is not None:
        base = _base(found.model, model, revision) if target.form == "full" else None
        write_checkpoint(found, chosen, Path(out), form=target.form, base=base)
    return chosen


def evaluate(
    checkpoint: str | Path | Checkpoint,
    dataset: str | Path | TextSource,
    *,
    model: Model | None = None,
    num_samples: int = 32,
    sequence_length: int | None = None,
    start_position: int = 0,
    speed: bool = True,
    field: str = "text",
    revision: str | None = None,
    device: str = "auto",
    streaming: Streaming = "auto",
    spill: str | Path | None = None,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Measure a checkpoint against the same model without it: predictions, layers, live cache bytes, decoding speed.

    Args:
        checkpoint: a folder, a hub id, or a checkpoint that was read.
        dataset: text that the model did not write itself: a file, a hub data set id, or a `TextSource`.
        model: a folder, a hub id or a loaded model; None: the model that the checkpoint names, at its commit.
        num_samples: token blocks.
        sequence_length: tokens in a block; None: 1024, or what is left of the longest context where that is shorter.
        start_position: where the blocks begin, to test the far end of the context.
        speed: also measure tokens a second of greedy decoding, with and without.
        field: of a row of text, where the dataset is given by its name.
        revision: commit, tag or branch of a hub model.
        device: as of `compress`.
        streaming: as of `compress`.
        spill: as of `compress`.
        report: called with each step of progress.

    Returns:
        `perplexity`, `perplexity_dense`, `kl` (nats a token), `kept`, `cache_bytes_per_token`,
        `cache_bytes_per_token_dense`, `tokens`, `layer_error` and `layer_cosine` by layer, `dtype`, `dataset`; with `speed`
        also `tokens_per_second`, `tokens_per_second_dense` and `device`, but not of a model that is streamed from disk.

    Raises:
        InvalidCheckpoint: the checkpoint is truncated or altered, or belongs to another model (`CheckpointMismatch`).
        InvalidDataset: the text cannot be read or is too short.
        InvalidSetting: positions that the model does not have, or text that the model writes itself.
    """
    _check_spill(spill)
    found = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(locate(checkpoint))
    longest = found.geometry.max_positions
    length = default_length(longest - start_position) if sequence_length is None else sequence_length
    if start_position:
        check_positions(found.geometry, start_position + length)
    text = dataset if isinstance(dataset, TextSource) else TextSource(str(dataset), field=field)
    needs_text(text.source)
    if model is None:
        model, revision = recorded_model(found.config["base_model"], revision), None
    with _opened(model, revision, device, streaming) as (source, loaded):
        blocks = load_blocks(
            text,
            load_tokenizer(source),
            num_samples=num_samples,
            sequence_length=length,
            max_positions=longest,
        ).placed([start_position] * num_samples)
        used = load(source, device, streaming=streaming) if loaded is None else loaded
        with spilled_to(None if spill is None else Path(spill)):
            return evaluate_checkpoint(used, found, blocks, speed=speed, report=report)


def load_profile(folder: str | Path) -> ErrorProfile:
    """Read the error-rank profile in a folder: of a checkpoint, or as the service hands it out.

    Raises:
        InvalidCheckpoint: files are missing, truncated, altered or of another version.
    """
    return ErrorProfile.load(Path(folder))


# ---------------------------------------------------------------------------------------- what was given


@contextmanager
def _opened(
    model: Model, revision: str | None, device: str, streaming: Streaming
) -> Iterator[tuple[ModelSource, PreTrainedModel | None]]:
    """A model's files, and the model itself where the caller has loaded it."""
    if isinstance(model, ModelSource):
        if revision not in (None, model.revision):
            raise InvalidSetting(f"revision {revision!r} has no effect: {model.id} is resolved already")
        yield model, None
    elif isinstance(model, (str, Path)):
        yield resolve_model(str(model), revision=revision), None
    elif isinstance(model, PreTrainedModel):
        if seam_of(model) is not None:
            raise InvalidSetting("a checkpoint is attached to the model: orthokv.detach it first")
        if (device, streaming) != ("auto", "auto"):
            raise InvalidSetting(
                f"device {device!r} and streaming {streaming!r} have no effect: the model is loaded, on {model.device}"
            )
        with borrowed(model):
            yield source_of(model, revision), model
    else:
        raise InvalidSetting(
            f"a model is a folder, a hub id or a PreTrainedModel of transformers, not a {type(model).__name__}"
        )


def _base(recorded: BaseModel, model: str | Path | ModelSource | None, revision: str | None) -> ModelSource:
    """The files of a profile's model: those that are named, else the recorded ones."""
    if model is None:
        return recorded_model(recorded, revision)
    return model if isinstance(model, ModelSource) else resolve_model(str(model), revision=revision)


def _settings(choices: Mapping[str, Any], source: ModelSource) -> FitSettings:
    given = {name: value for name, value in choices.items() if name in _names(FitSettings)}
    if given.get("sequence_length") is None:
        given["sequence_length"] = default_length(read_geometry(source).max_positions)
    return _made(FitSettings, given)


def _target(target: Target | None, budgets: Mapping[str, float | None], choices: Mapping[str, Any]) -> Target:
    given = {name: value for name, value in budgets.items() if value is not None}
    _refuse_both("target", target, {**given, **choices}, Target, *budgets)
    if target is not None:
        return target
    if len(given) != 1:
        raise InvalidSetting(f"give exactly one budget of {', '.join(budgets)}")
    ((metric, value),) = given.items()
    named = {name: value for name, value in choices.items() if name in _names(Target)}
    return _made(Target, {"budget": _made(Budget, {"metric": metric, "value": value}), **named})


def _made(kind: type[T], given: Mapping[str, Any]) -> T:
    try:
        return kind(**given)
    except TypeError as error:  # a word where a number belongs
        raise InvalidSetting(f"{kind.__name__}: {error}") from error


def _names(kind: type[FitSettings] | type[Target]) -> set[str]:
    """What may be given as a keyword; a budget is given by its metric."""
    return {field.name for field in fields(kind)} - {"budget"}


def _refuse_unknown(
    verb: Callable[..., Any], choices: Mapping[str, Any], *kinds: type[FitSettings] | type[Target]
) -> None:
    settings = set().union(*map(_names, kinds))
    for name in choices:
        if name not in settings:
            close = difflib.get_close_matches(name, {*settings, *signature(verb).parameters}, 1)
            hint = f"did you mean {close[0]!r}" if close else f"settings are {', '.join(sorted(settings))}"
            raise InvalidSetting(f"{verb.__name__} has no setting {name!r}: {hint}")


def _refuse_both(
    name: str,
    whole: object | None,
    choices: Mapping[str, Any],
    kind: type[FitSettings] | type[Target],
    *more: str,
) -> None:
    parts = [choice for choice in choices if choice in _names(kind) | {*more}]
    if whole is not None and parts:
        raise InvalidSetting(f"{name} holds {parts[0]} already: give {name} or its parts by name, not both")


def _check_spill(spill: str | Path | None) -> None:
    if spill is not None and not Path(spill).is_dir():
        raise InvalidSetting(f"spill {spill} is not a folder")
