"""`orthokv-client ...`, and `orthokv jobs ...` beside the library: the service from a terminal.

Exit codes: 0 done, 2 bad input (also when a job's model, dataset or settings turned out to be so), 3 budget unreachable,
1 anything else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

# Typer carries its own click and exports its errors only in part.
from typer._click.exceptions import ClickException, NoArgsIsHelpError

from orthokv_client import models
from orthokv_client.base import Model
from orthokv_client.errors import ApiError, ClientError, TokenUnreadable
from orthokv_client.protocol import DEFAULT_URL, Retry, is_api_key
from orthokv_client.synchronous import OrthoKV
from orthokv_client.watch import DownloadBar, estimated, show, summary
from orthokv_client.words import (
    HELP,
    INPUT_FAULTS,
    DatasetFormat,
    Form,
    JobStatus,
    KeyMode,
    MethodType,
    Parameterisation,
    Sharing,
)


def _default(model: type[Model], field: str) -> Any:
    """What the service takes where a body leaves this out."""
    return model.model_fields[field].default


FAILED, BAD_INPUT, BUDGET_UNREACHABLE = 1, 2, 3
DEFAULT_SEQUENCE_LENGTH: int = _default(models.DatasetRef1, "sequence_length")
# Where configurations of models say what their longest context is.
_CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len")

jobs = typer.Typer(
    help="Submit and follow jobs of a running service.", no_args_is_help=True, add_completion=False
)

Url = Annotated[str, typer.Option(envvar="ORTHOKV_URL", help="The service.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File that holds the API key. By default the key is taken from ORTHOKV_API_KEY."),
]
JobId = Annotated[str, typer.Argument(metavar="ID")]


def _stop(message: str, code: int) -> typer.Exit:
    """Raise what this returns."""
    typer.echo(f"orthokv: {message}", err=True)
    return typer.Exit(code)


def _api_key(file: Path | None) -> str | None:
    """The key of the file, or else of the environment; never an argument, which other users can list."""
    if file is not None:
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise _stop(f"cannot read a key from {file}", BAD_INPUT) from error
        place = str(file)
    elif (value := os.environ.get("ORTHOKV_API_KEY")) is not None:
        key, place = value.strip(), "ORTHOKV_API_KEY"
    else:
        return None
    if not is_api_key(key):
        raise _stop(f"{place} holds no API key: one begins with okv_", BAD_INPUT)
    return key


@contextmanager
def connected(url: str, key_file: Path | None) -> Iterator[OrthoKV]:
    """A client whose failures become one line and an exit code."""
    try:
        with OrthoKV(url, api_key=_api_key(key_file), retry=Retry(attempts=3)) as client:
            yield client
    except ApiError as error:
        raise _stop(str(error), BAD_INPUT if error.status < 500 else FAILED) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _stop(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", BAD_INPUT) from error
    except (ValueError, TokenUnreadable) as error:
        raise _stop(str(error), BAD_INPUT) from error
    except (ClientError, OSError) as error:
        raise _stop(str(error), FAILED) from error


@jobs.command("validate", help="Say what a job would take, and whether it would be taken. Nothing is kept.")
@jobs.command()
def submit(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A local folder or a hub id.")],
    dataset: Annotated[
        list[str], typer.Option(help="A file, or `self`. Given several times: a mixture in equal parts.")
    ],
    kept: Annotated[float | None, typer.Option(help="Budget: share of cache bytes to keep.")] = None,
    layer_error: Annotated[float | None, typer.Option(help="Budget: error of the worst layer.")] = None,
    perplexity_increase: Annotated[float | None, typer.Option(help="Budget: relative increase.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    method: MethodType = _default(models.Method, "type"),
    sharing: Annotated[Sharing, typer.Option(help=HELP["sharing"])] = _default(models.Method, "sharing"),
    key_mode: KeyMode = _default(models.Method, "key_mode"),
    parameterisation: Parameterisation = _default(models.Method, "parameterisation"),
    steps: Annotated[int | None, typer.Option(help=HELP["steps"])] = None,
    refine_steps: Annotated[int | None, typer.Option(help=HELP["refine_steps"])] = None,
    num_samples: int = _default(models.DatasetRef1, "num_samples"),
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens in a sample. Default: {DEFAULT_SEQUENCE_LENGTH}, or the longest context of a model "
            "in a local folder where that is shorter."
        ),
    ] = None,
    positions: Annotated[int | None, typer.Option(help=HELP["positions"])] = None,
    field: Annotated[str, typer.Option(help="Where a JSONL or Parquet row has its text.")] = _default(
        models.TextRef1, "field"
    ),
    dataset_format: Annotated[
        DatasetFormat | None, typer.Option("--format", help="By default from the file's name.")
    ] = None,
    form: Annotated[Form, typer.Option(help=HELP["form"])] = _default(models.JobCreate, "form"),
    rank_multiple: Annotated[int, typer.Option(help=HELP["rank_multiple"])] = _default(
        models.JobCreate, "rank_multiple"
    ),
    polish_steps: Annotated[int | None, typer.Option(help=HELP["polish_steps"])] = None,
    seed: int = _default(models.JobCreate, "seed"),
    max_runtime_minutes: Annotated[int | None, typer.Option(help=HELP["max_runtime_minutes"])] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """Send a job; says what it will take, and prints its id."""
    budgets = {"kept": kept, "layer_error": layer_error, "perplexity_increase": perplexity_increase}
    given = [(metric, value) for metric, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise _stop("give exactly one of --kept, --layer-error, --perplexity-increase", BAD_INPUT)
    for name in dataset:
        if name != "self" and not Path(name).is_file():
            raise _stop(f"{name} is not a file", BAD_INPUT)
    model_id = _model_id(model)
    if sequence_length is None:
        sequence_length = _default_sequence_length(Path(model_id))
    body: dict[str, Any] = {
        "model": {"id": model_id, "revision": revision},
        "budget": {"metric": given[0][0], "value": given[0][1]},
        "method": {
            "type": method,
            "sharing": sharing,
            "key_mode": key_mode,
            "parameterisation": parameterisation,
            "steps": steps,
            "refine_steps": refine_steps,
            "positions": positions,
        },
        "form": form,
        "rank_multiple": rank_multiple,
        "polish_steps": polish_steps,
        "seed": seed,
        "max_runtime_minutes": max_runtime_minutes,
    }
    with connected(url, api_key_file) as client:
        texts = [
            {"source": "self"}
            if name == "self"
            else {"id": client.datasets.upload(name, format=dataset_format).id, "field": field}
            for name in dataset
        ]
        amount = {"num_samples": num_samples, "sequence_length": sequence_length, "also": texts[1:]}
        body["dataset"] = {**texts[0], **amount}
        found = client.jobs.validate(body)
        if context.command.name == "validate":
            for text in texts:  # files were uploaded for the answer alone
                if "id" in text:
                    client.datasets.delete(text["id"])
            typer.echo(estimated(found.estimate))
            for problem in found.problems:
                typer.echo(f"orthokv: {problem.detail}", err=True)
            raise typer.Exit(0 if found.valid else BAD_INPUT)
        typer.echo(estimated(found.estimate), err=True)
        job = client.jobs.create(body)
        typer.echo(job.id)
        if wait:
            _follow(client, job.id)


@jobs.command()
def watch(job_id: JobId, url: Url = DEFAULT_URL, api_key_file: KeyFile = None) -> None:
    """Follow a job to its end."""
    with connected(url, api_key_file) as client:
        _follow(client, job_id)


@jobs.command()
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds; then exit code 1.")] = None,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """Wait for the end of a job and say what came of it, no more."""
    with connected(url, api_key_file) as client:
        _conclude(client.jobs.wait(job_id, timeout_seconds=timeout))


@jobs.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs of this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model id.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of jobs.")] = 20,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """List jobs, newest first."""
    with connected(url, api_key_file) as client:
        for job in islice(client.jobs.list(status=status, model=model, page_size=min(limit, 100)), limit):
            budget = job.spec.budget
            # A job from a stored profile names no model.
            spec = job.spec
            subject = spec.model.id if isinstance(spec, models.CompressSpec) else spec.profile_id
            typer.echo(
                f"{job.id}  {job.created_at:%Y-%m-%dT%H:%M:%SZ}  {job.status:<10}  {job.phase:<12}  "
                f"{budget.metric}={budget.value:g}  {subject}"
            )


@jobs.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key_file: KeyFile = None) -> None:
    """Ask for the end of a job."""
    with connected(url, api_key_file) as client:
        typer.echo(client.jobs.cancel(job_id).status)


@jobs.command()
def retry(job_id: JobId, url: Url = DEFAULT_URL, api_key_file: KeyFile = None) -> None:
    """Run a failed or cancelled job again, from what it lacks."""
    with connected(url, api_key_file) as client:
        typer.echo(client.jobs.retry(job_id).status)


@jobs.command()
def download(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoint.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for the profile's files.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=32, help="Ranges of a large file at once.")] = 4,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """Fetch the checkpoint of a job, its profile, or both. Broken downloads resume; every file is checked."""
    if out is None and profile is None:
        raise _stop("say where to: --out DIR, --profile DIR, or both", BAD_INPUT)
    with connected(url, api_key_file) as client:
        result = client.jobs.get(job_id).result or models.JobResult()
        if out is not None:
            checkpoint_id = _made(result.checkpoint_id, "checkpoint", job_id)
            _download(client, client.checkpoints.files(checkpoint_id).data, out, connections)
        if profile is not None:
            files = client.profiles.get(_made(result.profile_id, "profile", job_id)).files
            _download(client, [files.json_, files.tensors, files.plot], profile, connections)


def _follow(client: OrthoKV, job_id: str) -> None:
    _conclude(show(client.jobs.follow(job_id), Console()))


def _conclude(job: models.Job) -> None:
    ok = job.status == "succeeded"
    for line in summary(job):
        typer.echo(line, err=not ok)
    if not ok:
        raise typer.Exit(_exit_code(job.error))


def _exit_code(error: models.JobError | None) -> int:
    if error is None or error.code not in INPUT_FAULTS:  # cancelled, or none of the input's fault
        return FAILED
    return BUDGET_UNREACHABLE if error.code == "budget_unreachable" else BAD_INPUT


def _download(client: OrthoKV, artifacts: Sequence[models.Artifact], folder: Path, connections: int) -> None:
    with DownloadBar(artifacts, Console(stderr=True)) as bar:
        paths = client.download(artifacts, folder, connections=connections, progress=bar.advance)
    for path in paths:
        typer.echo(str(path))


def _made(found: str | None, what: str, job_id: str) -> str:
    if found is None:
        raise _stop(f"{job_id} has made no {what}", BAD_INPUT)
    return found


def _default_sequence_length(folder: Path) -> int:
    """The service's default, or the longest context of the model in this folder where that is shorter, and then it is said."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return DEFAULT_SEQUENCE_LENGTH  # a model of the hub, or none: the service finds out
    places = [config, config.get("text_config")] if isinstance(config, dict) else []
    lengths: list[int] = [
        place[name]
        for place in places
        for name in _CONTEXT_FIELDS
        if isinstance(place, dict) and type(place.get(name)) is int and place[name] >= 2
    ]
    length = min([DEFAULT_SEQUENCE_LENGTH, *lengths])
    if length < DEFAULT_SEQUENCE_LENGTH:
        typer.echo(f"sequence length {length}: the model's longest context", err=True)
    return length


def _model_id(model: str) -> str:
    """A folder as the service has to see it, or a hub id as it is."""
    path = Path(model)
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith("."):
        raise _stop(f"{model} is not a folder", BAD_INPUT)
    return model


def main() -> None:
    """`orthokv-client`: run a command, and exit with its code."""
    try:
        code = jobs(standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(BAD_INPUT)
    except ClickException as error:
        # One line, where click itself would add the usage of the command.
        typer.echo(f"orthokv: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
