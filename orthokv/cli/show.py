"""Commands that measure and describe what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthokv.cli import given
from orthokv.cli.options import (
    Dataset,
    Device,
    Field,
    Json,
    Length,
    Revision,
    Samples,
    SpillOption,
    StreamingOption,
)
from orthokv.cli.output import out_console, print_json, print_quality, reporter
from orthokv.spec.records import CheckpointRecord


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
    from orthokv import face
    from orthokv.checkpoint.read import read_checkpoint

    given.check_spill(spill)
    found = read_checkpoint(checkpoint)  # a folder: nothing is fetched from the hub here
    with reporter() as report:
        measured = face.evaluate(
            found,
            dataset,
            model=model,
            num_samples=num_samples,
            sequence_length=sequence_length,
            start_position=start_position,
            field=field,
            revision=revision,
            device=device,
            streaming=streaming,  # type: ignore[arg-type]
            spill=spill,
            report=report,
        )
    if as_json:
        print_json(measured)
    else:
        print_quality(measured)


def inspect(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or profile folder.")],
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the error-rank profile.")] = None,
    as_json: Json = False,
) -> None:
    """Verify every file of a checkpoint or profile and show what is in it."""
    from orthokv.checkpoint.read import read_checkpoint
    from orthokv.files.digests import verify_files
    from orthokv.planning.profile import ErrorProfile
    from orthokv.show.tables import profile_table
    from orthokv.spec.names import CONFIG

    given.check_plot(plot)
    described: CheckpointRecord | None = None
    if (folder / CONFIG).is_file():
        verify_files(folder)
        described = read_checkpoint(folder).config
    found = ErrorProfile.load(folder)
    if plot is not None:
        from orthokv.show.plots import plot_profile

        plot_profile(found, plot)
    if as_json:
        print_json(described or found.to_dict())
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
            print_quality(described["measured"])
