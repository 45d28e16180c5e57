"""Commands that fit, plan and compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from orthokv.cli import given
from orthokv.cli.options import (
    CodecOption,
    Datasets,
    Device,
    Field,
    FormOption,
    Increase,
    Json,
    Kept,
    KeyModeOption,
    LayerError,
    Length,
    Model,
    Out,
    Positions,
    RankChoices,
    RankMultiple,
    RefineSteps,
    Revision,
    Samples,
    SpillOption,
    StreamingOption,
)
from orthokv.cli.output import err_console, out_console, print_json, print_quality, reporter
from orthokv.files.folders import refuse_taken
from orthokv.spec.budget import Budget
from orthokv.spec.check import check
from orthokv.spec.codec import DEFAULT_CODEC
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.methods import METHODS
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import ALLOCATIONS, SHARINGS, Allocation


def compress(
    model: Model,
    dataset: Datasets,
    out: Out,
    kept: Kept = None,
    layer_error: LayerError = None,
    perplexity_increase: Increase = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "oblique",
    sharing: Annotated[
        str,
        typer.Option(
            help=f"Which heads share a basis: {', '.join(SHARINGS)}, or auto: each layer its own group."
        ),
    ] = "joint",
    key_mode: KeyModeOption = "pre",
    parameterisation: Annotated[str | None, typer.Option(help="stiefel only: direct or predictor.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps a layer of the learned methods.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the blocks of stiefel's predictor.")] = None,
    refine_steps: RefineSteps = None,
    propagate: Annotated[
        float | None,
        typer.Option(
            help="Fit each layer on what the layers before it produce when cut to this share of their widths "
            "(default: on uncompressed inputs)."
        ),
    ] = None,
    rank_multiple: RankMultiple = 1,
    rank_choices: RankChoices = None,
    num_samples: Samples = 64,
    sequence_length: Length = None,
    positions: Positions = None,
    field: Field = "text",
    form: FormOption = "adapter",
    codec: CodecOption = DEFAULT_CODEC,
    polish_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of a refinement at the chosen ranks; 0 leaves it out (default: half of the refinement's own)."
        ),
    ] = None,
    seed: int = 0,
    device: Device = "auto",
    streaming: StreamingOption = "auto",
    spill: SpillOption = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Fit bases, choose ranks for a budget and write a checkpoint."""
    budget = Budget.from_options(kept=kept, layer_error=layer_error, perplexity_increase=perplexity_increase)
    target = Target(
        budget,
        grid=given.grid(rank_multiple, rank_choices),
        form=form,  # type: ignore[arg-type]  # checked where it is made
        codec=codec,  # type: ignore[arg-type]
        polish_steps=polish_steps,
    )
    from orthokv import face
    from orthokv.models.memory import GIB, peak_bytes, peak_device_bytes
    from orthokv.show.tables import plan_table

    given.check_spill(spill)
    with reporter() as report:
        made = face.compress(
            model,
            dataset,
            out=out,
            target=target,
            field=field,
            revision=revision,
            device=device,
            streaming=streaming,  # type: ignore[arg-type]
            spill=spill,
            report=report,
            method=method,
            sharing=sharing,
            key_mode=key_mode,
            parameterisation=parameterisation,
            steps=steps,
            epochs=epochs,
            refine_steps=refine_steps,
            propagate=propagate,
            num_samples=num_samples,
            sequence_length=sequence_length,
            positions=positions,
            seed=seed,
        )
    if as_json:
        print_json(
            {
                "checkpoint": str(out),
                "measured": made.measured,
                "plan": made.plan.to_dict(),
                "reached": None if made.reached is None else asdict(made.reached),
                "warnings": made.profile.warnings,
                "peak_memory_bytes": peak_bytes(),
                "peak_device_bytes": peak_device_bytes(),
            }
        )
        return
    out_console.print(plan_table(made.plan, made.profile))
    for warning in made.profile.warnings:
        err_console.print(f"orthokv: {warning}", soft_wrap=True, highlight=False)
    print_quality(made.measured)
    out_console.print(f"checkpoint: {out}", soft_wrap=True)
    on_device = f", {peak_device_bytes() / GIB:.1f} GiB on the device" if peak_device_bytes() else ""
    out_console.print(f"peak memory {peak_bytes() / GIB:.1f} GiB{on_device}")


def compare(
    model: Model,
    dataset: Datasets,
    kept: Annotated[str, typer.Option(help="Shares of bytes, separated by commas.")],
    methods: Annotated[
        str,
        typer.Option(help="method:sharing[:parameterisation], separated by commas; sharings as in compress."),
    ],
    evaluation: Annotated[str, typer.Option("--eval", help="Text to evaluate on, other than --dataset.")],
    key_mode: KeyModeOption = "pre",
    allocation: Annotated[
        str, typer.Option(help="knapsack, greedy, uniform or pareto: the same rule for all methods.")
    ] = "knapsack",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps a layer of the learned methods.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the blocks of stiefel's predictor.")] = None,
    num_samples: Samples = 64,
    sequence_length: Length = None,
    eval_samples: Annotated[int, typer.Option(help="Blocks to evaluate on.")] = 32,
    field: Field = "text",
    seed: int = 0,
    device: Device = "auto",
    streaming: StreamingOption = "auto",
    revision: Revision = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of quality against bytes.")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods at equal measured bytes on text that none of them saw."""
    from orthokv.compare import MethodChoice, compare_methods
    from orthokv.models.loading import load, read_geometry
    from orthokv.models.source import load_tokenizer, resolve_model
    from orthokv.pipeline import prepare_blocks
    from orthokv.show.tables import comparison_table
    from orthokv.text.packing import load_blocks
    from orthokv.text.source import TextSource, needs_text, text_of

    given.check_plot(plot)
    needs_text(evaluation)
    choices = [MethodChoice.parse(text) for text in methods.split(",")]
    shares = given.shares(kept)
    rules = [rule for rule in ALLOCATIONS if rule != "threshold"]  # which only some methods have
    if allocation not in rules:
        raise InvalidSetting(f"allocation must be one of {', '.join(rules)}, not {allocation!r}")
    source = resolve_model(model, revision=revision)
    geometry = read_geometry(source)
    length = given.length(sequence_length, geometry.max_positions)
    settings = FitSettings(
        method="stiefel",  # the one that has all hyper-parameters; each choice takes those that it has
        key_mode=key_mode,  # type: ignore[arg-type]
        num_samples=num_samples,
        sequence_length=length,
        seed=seed,
        steps=steps,
        epochs=epochs,
    )
    for choice in choices:
        for share in shares:
            check(geometry, choice.settings(settings), Target(Budget("kept", share)))
    loaded = load(source, device, streaming=streaming)  # type: ignore[arg-type]
    with reporter() as report:
        blocks = prepare_blocks(source, text_of(dataset, field), settings, loaded, report)
        held_out = load_blocks(
            TextSource(evaluation, field=field),
            load_tokenizer(source),
            num_samples=eval_samples,
            sequence_length=length,
        )
        rows = compare_methods(
            loaded,
            source,
            blocks,
            held_out,
            shares,
            choices,
            settings,
            allocation=cast("Allocation", allocation),
            report=report,
        )
    if plot is not None:
        from orthokv.show.plots import plot_comparison

        plot_comparison(rows, plot)
    if as_json:
        print_json(
            {"model": source.id, "evaluation": held_out.source, "rows": [row.to_dict() for row in rows]}
        )
    else:
        out_console.print(comparison_table(rows, rows[0].perplexity_dense))


def plan(
    profile: Annotated[Path, typer.Argument(help="A folder with a profile: downloaded, or any checkpoint.")],
    out: Out,
    kept: Kept = None,
    layer_error: LayerError = None,
    allocation: Annotated[
        str, typer.Option(help="knapsack, greedy, uniform, or the papers': pareto, threshold.")
    ] = "knapsack",
    rank_multiple: RankMultiple = 1,
    rank_choices: RankChoices = None,
    form: FormOption = "adapter",
    codec: CodecOption = DEFAULT_CODEC,
    model: Annotated[str | None, typer.Option(help="The base model's files, for --form full.")] = None,
    revision: Revision = None,
) -> None:
    """Make another checkpoint from a stored profile, of its own bases: seconds, no fitting, no polish, no model."""
    target = Target(
        Budget.from_options(kept=kept, layer_error=layer_error),
        grid=given.grid(rank_multiple, rank_choices),
        allocation=allocation,  # type: ignore[arg-type]  # checked where it is made
        form=form,  # type: ignore[arg-type]
        codec=codec,  # type: ignore[arg-type]
    )
    from orthokv import face
    from orthokv.show.tables import plan_table

    refuse_taken(out)
    found = face.load_profile(profile)
    chosen = face.plan(found, out=out, target=target, model=model, revision=revision)
    out_console.print(plan_table(chosen, found))
    out_console.print(
        f"checkpoint: {out} (quality not measured: orthokv evaluate {out} --dataset FILE)", soft_wrap=True
    )
