"""``orthokv``: the library from a terminal. Exit codes: 0 done, 2 bad input, 3 budget unreachable, 1 a defect of ours."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console

# Typer carries its own click and exports its errors only in part.
from typer._click.exceptions import ClickException, NoArgsIsHelpError

from orthokv.budget import Budget
from orthokv.errors import BudgetUnreachable, OrthoKVError
from orthokv.progress import BarReporter, PlainReporter, Reporter

if TYPE_CHECKING:
    from orthokv.allocate import Allocation
    from orthokv.dataset import TextMixture, TextSource
    from orthokv.rankgrid import RankGrid

app = typer.Typer(
    name="orthokv",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# On no index: installed from a folder of the repository.
_CLIENT = "orthokv_client"
# Off a terminal (a pipe, a log) rich would cut tables at 80 columns; the widest has this many.
TABLE_COLUMNS = 140
out_console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
err_console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A local folder or a hub id; safetensors only, no remote code.")]
_TEXT = "JSONL, plain text, Parquet, a hub data set id, or 'self': the model writes its own."
Dataset = Annotated[str, typer.Option(help="JSONL, plain text, Parquet or a hub data set id.")]
Datasets = Annotated[
    list[str], typer.Option("--dataset", help=f"{_TEXT} Given several times: a mixture in equal parts.")
]
Field = Annotated[str, typer.Option(help="The field of a row that holds the text.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")]
Kept = Annotated[float | None, typer.Option(help="Share of the 16-bit cache's bytes to keep, in (0, 1].")]
LayerError = Annotated[
    float | None, typer.Option(help="Largest relative error of any decoder layer's output.")
]
Increase = Annotated[
    float | None, typer.Option(help="Largest relative increase of perplexity, checked on held-out text.")
]
RefineSteps = Annotated[
    int | None,
    typer.Option(
        help="Steps of the last stage, all layers together; 0 leaves it out. Default: the method's own."
    ),
]
RankMultiple = Annotated[
    int, typer.Option(help="Every rank is a multiple of this, e.g. 16 for tensor cores.")
]
RankChoices = Annotated[
    str | None, typer.Option(help="Every rank is one of these, separated by commas, e.g. 32,64,128.")
]
Samples = Annotated[int, typer.Option(help="Number of token blocks.")]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a block. Default: 1024, or the model's longest context where that is shorter."
    ),
]
Positions = Annotated[
    int | None,
    typer.Option(
        help="Key mode post only, whose bases depend on positions: calibrate all over positions 0 to this, the longest "
        "context that you will serve. Default: the model's own."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
StreamingOption = Annotated[
    str,
    typer.Option(
        "--streaming",
        help="Read one decoder layer at a time from disk: on, off, or auto (if memory is short).",
    ),
]
SpillOption = Annotated[
    Path | None, typer.Option("--spill", help="A folder for hidden states, which otherwise stay in memory.")
]
FormOption = Annotated[str, typer.Option(help="adapter, or full: with the base model's own files.")]
Out = Annotated[Path, typer.Option(help="A folder that does not exist yet.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

DEFAULT_LENGTH = 1024


def _show_version(wanted: bool) -> None:
    if wanted:
        from orthokv import __version__

        out_console.print(f"orthokv {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make the KV cache of a language model several times smaller."""


@contextmanager
def reporter() -> Iterator[Reporter]:
    """A live bar in a terminal, plain lines otherwise; both on standard error."""
    if err_console.is_terminal:
        with BarReporter(err_console) as bar:
            yield bar
    else:
        yield PlainReporter()


def _length(given: int | None, longest: int) -> int:
    return min(DEFAULT_LENGTH, longest) if given is None else given


def _text(names: list[str], field: str) -> TextSource | TextMixture:
    from orthokv.dataset import TextMixture, TextSource

    parts = tuple(TextSource(name, field=field) for name in names)
    return parts[0] if len(parts) == 1 else TextMixture(parts)


@app.command()
def compress(
    model: Model,
    dataset: Datasets,
    out: Out,
    kept: Kept = None,
    layer_error: LayerError = None,
    perplexity_increase: Increase = None,
    method: Annotated[str, typer.Option(help="oblique, stiefel, weighted, eigen or palu.")] = "oblique",
    sharing: Annotated[
        str,
        typer.Option(
            help="Which heads share a basis: head, tied, pair, quad, joint, or auto: each layer its own group."
        ),
    ] = "joint",
    key_mode: Annotated[str, typer.Option(help="Keys cached before (pre) or after (post) RoPE.")] = "pre",
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
    from orthokv.capture import spilled_to
    from orthokv.checkpoint import FORMS
    from orthokv.errors import InvalidSetting
    from orthokv.memory import GIB, peak_bytes, peak_device_bytes
    from orthokv.pipeline import FitSettings, read_geometry
    from orthokv.pipeline import compress as run
    from orthokv.source import resolve_model

    if form not in FORMS:
        raise InvalidSetting(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    _refuse_taken(out)
    _check_spill(spill)
    source = resolve_model(model, revision=revision)
    settings = FitSettings(
        method=method,
        sharing=sharing,  # type: ignore[arg-type]
        key_mode=key_mode,  # type: ignore[arg-type]
        parameterisation=parameterisation,
        steps=steps,
        epochs=epochs,
        refine_steps=refine_steps,
        propagate=propagate,
        num_samples=num_samples,
        sequence_length=_length(sequence_length, read_geometry(source).max_positions),
        positions=positions,
        seed=seed,
    )
    with reporter() as report, spilled_to(spill):
        made = run(
            source,
            _text(dataset, field),
            budget,
            out,
            settings,
            grid=_grid(rank_multiple, rank_choices),
            form=form,  # type: ignore[arg-type]
            polish_steps=polish_steps,
            device=device,
            streaming=streaming,  # type: ignore[arg-type]
            report=report,
        )
    if as_json:
        _print_json(
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
    from orthokv.tables import plan_table

    out_console.print(plan_table(made.plan, made.profile))
    for warning in made.profile.warnings:
        err_console.print(f"orthokv: {warning}", soft_wrap=True, highlight=False)
    _print_quality(made.measured)
    out_console.print(f"checkpoint: {out}", soft_wrap=True)
    on_device = f", {peak_device_bytes() / GIB:.1f} GiB on the device" if peak_device_bytes() else ""
    out_console.print(f"peak memory {peak_bytes() / GIB:.1f} GiB{on_device}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    dataset: Dataset,
    model: Annotated[
        str | None, typer.Option(help="The base model, where it is not the one recorded.")
    ] = None,
    num_samples: Samples = 32,
    sequence_length: Length = None,
    start_position: Annotated[
        int,
        typer.Option(min=0, help="Where the blocks begin: near the longest context, to test its far end."),
    ] = 0,
    field: Field = "text",
    device: Device = "auto",
    streaming: StreamingOption = "auto",
    spill: SpillOption = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint: perplexity, KL, layer errors, live cache bytes and decoding speed."""
    from orthokv.capture import spilled_to
    from orthokv.checkpoint import read_checkpoint
    from orthokv.dataset import TextSource, load_blocks
    from orthokv.geometry import check_positions
    from orthokv.pipeline import evaluate_checkpoint, load
    from orthokv.source import load_tokenizer

    _check_spill(spill)
    found = read_checkpoint(checkpoint)
    length = _length(sequence_length, found.geometry.max_positions - start_position)
    if start_position:
        check_positions(found.geometry, start_position + length)
    _needs_text(dataset)
    source = _base_of(found.config["base_model"], model, revision)
    blocks = load_blocks(
        TextSource(dataset, field=field),
        load_tokenizer(source),
        num_samples=num_samples,
        sequence_length=length,
        max_positions=found.geometry.max_positions,
    ).placed([start_position] * num_samples)
    loaded = load(source, device, streaming=streaming)  # type: ignore[arg-type]
    with reporter() as report, spilled_to(spill):
        measured = evaluate_checkpoint(loaded, found, blocks, speed=True, report=report)
    if as_json:
        _print_json(measured)
    else:
        _print_quality(measured)


@app.command()
def compare(
    model: Model,
    dataset: Datasets,
    kept: Annotated[str, typer.Option(help="Shares of bytes, separated by commas.")],
    methods: Annotated[
        str,
        typer.Option(help="method:sharing[:parameterisation], separated by commas; sharings as in compress."),
    ],
    evaluation: Annotated[str, typer.Option("--eval", help="Text to evaluate on, other than --dataset.")],
    key_mode: Annotated[str, typer.Option(help="Keys cached before (pre) or after (post) RoPE.")] = "pre",
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
    from orthokv.allocate import ALLOCATIONS
    from orthokv.compare import MethodChoice, compare_methods
    from orthokv.dataset import TextSource, load_blocks
    from orthokv.errors import InvalidSetting
    from orthokv.grouping import sharings_of
    from orthokv.pipeline import FitSettings, load, prepare_blocks, read_geometry
    from orthokv.source import load_tokenizer, resolve_model
    from orthokv.tables import comparison_table

    _check_plot(plot)
    _needs_text(evaluation)
    choices = [MethodChoice.parse(text) for text in methods.split(",")]
    shares = _shares(kept)
    rules = [rule for rule in ALLOCATIONS if rule != "threshold"]  # which only some methods have
    if allocation not in rules:
        raise InvalidSetting(f"allocation must be one of {', '.join(rules)}, not {allocation!r}")
    source = resolve_model(model, revision=revision)
    geometry = read_geometry(source)
    length = _length(sequence_length, geometry.max_positions)
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
        sharings_of(choice.settings(settings).sharing, geometry)
    loaded = load(source, device, streaming=streaming)  # type: ignore[arg-type]
    with reporter() as report:
        blocks = prepare_blocks(source, _text(dataset, field), settings, loaded, report)
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
        from orthokv.plots import plot_comparison

        plot_comparison(rows, plot)
    if as_json:
        _print_json(
            {"model": source.id, "evaluation": held_out.source, "rows": [row.to_dict() for row in rows]}
        )
    else:
        out_console.print(comparison_table(rows, rows[0].perplexity_dense))


@app.command()
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
    model: Annotated[str | None, typer.Option(help="The base model's files, for --form full.")] = None,
    revision: Revision = None,
) -> None:
    """Make another checkpoint from a stored profile, of its own bases: seconds, no fitting, no polish, no model."""
    from orthokv.allocate import allocate
    from orthokv.checkpoint import write_checkpoint
    from orthokv.profile import ErrorProfile
    from orthokv.tables import plan_table

    budget = Budget.from_options(kept=kept, layer_error=layer_error)
    _refuse_taken(out)
    found = ErrorProfile.load(profile)
    chosen = allocate(found, budget, allocation, _grid(rank_multiple, rank_choices))  # type: ignore[arg-type]
    base = _base_of(found.model, model, revision) if form == "full" else None
    write_checkpoint(found, chosen, out, form=form, base=base)  # type: ignore[arg-type]
    out_console.print(plan_table(chosen, found))
    out_console.print(
        f"checkpoint: {out} (quality not measured: orthokv evaluate {out} --dataset FILE)", soft_wrap=True
    )


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, where it is not the one recorded.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    uncompressed: Annotated[
        bool, typer.Option("--uncompressed", help="Do not attach the checkpoint: what the base model writes.")
    ] = False,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the compressed cache, and show what the cache held."""
    from orthokv.checkpoint import read_checkpoint
    from orthokv.generation import generate as run
    from orthokv.pipeline import load
    from orthokv.source import load_tokenizer

    found = read_checkpoint(checkpoint)
    source = _base_of(found.config["base_model"], model, revision)
    used = None if uncompressed else found
    made = run(load(source, device, streaming="off"), load_tokenizer(source), used, prompt, max_new_tokens)
    if as_json:
        _print_json(made.to_dict())
        return
    out_console.print(made.text, markup=False, highlight=False, soft_wrap=True)
    err_console.print(
        f"cache: {made.cache_bytes} bytes for {made.cached_tokens} tokens, "
        f"{100 * made.kept:.1f} % of {made.cache_bytes_dense} uncompressed"
    )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or profile folder.")],
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the error-rank profile.")] = None,
    as_json: Json = False,
) -> None:
    """Verify every file of a checkpoint or profile and show what is in it."""
    from orthokv.checkpoint import read_checkpoint
    from orthokv.digests import verify_files
    from orthokv.naming import CONFIG
    from orthokv.profile import ErrorProfile
    from orthokv.tables import profile_table

    _check_plot(plot)
    described: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        verify_files(folder)
        described = read_checkpoint(folder).config
    found = ErrorProfile.load(folder)
    if plot is not None:
        from orthokv.plots import plot_profile

        plot_profile(found, plot)
    if as_json:
        _print_json(described or found.to_dict())
        return
    out_console.print(profile_table(found))
    if described:
        cache = described["cache"]
        out_console.print(
            f"{folder}: sound; {cache['bytes_per_token']} of {cache['bytes_per_token_dense']} bytes a token "
            f"({100 * cache['kept']:.1f} %), {described['method']['name']}:{described['sharing']}, "
            f"keys {described['key_mode']}-RoPE, base model {described['base_model']['id']}",
            soft_wrap=True,
        )
        pairs = ", ".join(f"{r['key']['rank']}/{r['value']['rank']}" for r in described["ranks"])
        out_console.print(f"ranks per group, keys/values, by layer: {pairs}", soft_wrap=True, highlight=False)
        if described["measured"] is not None:
            _print_quality(described["measured"])


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; an existing one must be so.")
    ] = False,
    revision: Annotated[str, typer.Option(help="The branch; made where it is missing.")] = "main",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify and list what would be sent; asks the hub nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint with its card on the hub, in one commit. The token is HF_TOKEN's, or that of `hf auth login`."""
    from orthokv.hub import prepare, upload

    prepared = prepare(checkpoint, repo_id)
    commit = None if dry_run else upload(prepared, private=private, revision=revision)
    if as_json:
        _print_json(
            {
                "repo_id": repo_id,
                "revision": revision,
                "commit": None if commit is None else commit.commit,
                "url": None if commit is None else commit.url,
                "files": prepared.sizes,
            }
        )
        return
    for name, size in prepared.sizes.items():
        out_console.print(f"{size:>14}  {name}", highlight=False, soft_wrap=True)
    total = f"{len(prepared.sizes)} files, {sum(prepared.sizes.values())} bytes"
    if commit is None:
        out_console.print(
            f"dry run: nothing was sent; {total} for {repo_id}", highlight=False, soft_wrap=True
        )
        return
    out_console.print(f"pushed {total} to {repo_id}: commit {commit.commit}", highlight=False, soft_wrap=True)
    out_console.print(commit.url, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------- shared by commands


def _base_of(recorded: dict[str, Any], model: str | None, revision: str | None) -> Any:
    """The base model that the user names, else the recorded one, at its recorded commit."""
    from orthokv.source import resolve_model

    if model is None:
        return resolve_model(recorded["id"], revision=revision or recorded["revision"])
    return resolve_model(model, revision=revision)


def _refuse_taken(out: Path) -> None:
    """Before hours of fitting, not after them."""
    from orthokv.errors import InvalidSetting

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidSetting(f"{out} exists and is not an empty folder")


def _needs_text(dataset: str) -> None:
    """Text that the model writes flatters it: predictions are measured on text that it did not."""
    from orthokv.errors import InvalidSetting

    if dataset == "self":
        raise InvalidSetting(
            "measuring needs text that the model did not write itself: name a file or a data set"
        )


def _check_spill(spill: Path | None) -> None:
    from orthokv.errors import InvalidSetting

    if spill is not None and not spill.is_dir():
        raise InvalidSetting(f"--spill {spill} is not a folder")


def _check_plot(plot: Path | None) -> None:
    """Before the work, not after it."""
    from orthokv.errors import InvalidSetting

    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        raise InvalidSetting(f"--plot {plot} is not a file in an existing folder")


def _grid(multiple: int, choices: str | None) -> RankGrid:
    from orthokv.errors import InvalidSetting
    from orthokv.rankgrid import RankGrid

    try:
        return RankGrid(multiple, tuple(int(part) for part in choices.split(",")) if choices else ())
    except ValueError as error:
        raise InvalidSetting(f"--rank-choices {choices!r}: {error}") from error


def _shares(text: str) -> list[float]:
    from orthokv.errors import InvalidSetting

    try:
        return [Budget("kept", float(part)).value for part in text.split(",")]
    except ValueError as error:
        raise InvalidSetting(f"--kept {text!r}: {error}") from error


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def _print_quality(measured: dict[str, Any]) -> None:
    from orthokv.wording import begin_at

    ratio = measured["perplexity"] / measured["perplexity_dense"]
    out_console.print(
        f"perplexity {measured['perplexity']:.3f}, uncompressed {measured['perplexity_dense']:.3f} "
        f"([bold]{ratio:.3f} x[/bold]), KL {measured['kl']:.4f} nats over {measured['tokens']} tokens"
    )
    # A checkpoint of before blocks could begin elsewhere does not say where: at 0.
    if where := begin_at(measured["dataset"].get("starts", ())):
        out_console.print(f"measured on {where}")
    out_console.print(
        f"live cache {measured['cache_bytes_per_token']:g} of {measured['cache_bytes_per_token_dense']:g} bytes a token "
        f"([bold]kept {100 * measured['kept']:.1f} %[/bold])"
    )
    if "tokens_per_second" in measured:
        out_console.print(
            f"decoding {measured['tokens_per_second']:.1f} tokens/s, uncompressed "
            f"{measured['tokens_per_second_dense']:.1f} ({measured['device']})"
        )


def _add_commands() -> None:
    """Commands of installed packages (the service adds `serve`, its client `jobs`); the library itself imports none of them."""
    entries = entry_points(group="orthokv.commands")
    for entry in entries:
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            # The library may be installed without the service's extras: say so when the command is used.
            _add_unavailable(entry.name, str(error.name).partition(".")[0])
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    if "jobs" not in entries.names:
        _add_unavailable("jobs", _CLIENT)


def _add_unavailable(name: str, missing: str) -> None:
    install = "./clients/python" if missing == _CLIENT else "'orthokv[server]'"

    def command() -> None:
        from orthokv.errors import InvalidSetting

        raise InvalidSetting(f"'orthokv {name}' needs pip install {install} ({missing} is not installed)")

    # Whatever it was given: the answer is the same.
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    about = f"Needs pip install {install} ({missing} is not installed)."
    app.command(name, help=about, context_settings=anything)(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _add_commands()
    try:
        code = app(arguments, standalone_mode=False)
    except BudgetUnreachable as error:
        _stop(str(error), 3)
    except OrthoKVError as error:
        _stop(str(error), 2)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except ClickException as error:
        # One line, where click itself would add the usage of the command.
        _stop(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str, code: int) -> NoReturn:
    err_console.print(f"orthokv: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
