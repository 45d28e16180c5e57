"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
CodecOption = Annotated[
    str, typer.Option("--codec", help="How latents are stored: 16-bit, or native (the model's own dtype).")
]
KeyModeOption = Annotated[
    str, typer.Option("--key-mode", help="Keys cached before (pre) or after (post) RoPE.")
]
