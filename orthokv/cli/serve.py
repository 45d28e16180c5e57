"""Commands that use a checkpoint: generate text with it, publish it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orthokv.cli import given
from orthokv.cli.options import (
    Device,
    Json,
    Revision,
)
from orthokv.cli.output import err_console, out_console, print_json


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
    from orthokv.checkpoint.read import read_checkpoint
    from orthokv.models.loading import load
    from orthokv.models.source import load_tokenizer
    from orthokv.serving.generation import generate as run

    found = read_checkpoint(checkpoint)
    source = given.base_of(found.config["base_model"], model, revision)
    used = None if uncompressed else found
    made = run(load(source, device, streaming="off"), load_tokenizer(source), used, prompt, max_new_tokens)
    if as_json:
        print_json(made.to_dict())
        return
    out_console.print(made.text, markup=False, highlight=False, soft_wrap=True)
    err_console.print(
        f"cache: {made.cache_bytes} bytes for {made.cached_tokens} tokens, "
        f"{100 * made.kept:.1f} % of {made.cache_bytes_dense} uncompressed"
    )


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
    from orthokv.checkpoint.hub import prepare, upload

    prepared = prepare(checkpoint, repo_id)
    commit = None if dry_run else upload(prepared, private=private, revision=revision)
    if as_json:
        print_json(
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
