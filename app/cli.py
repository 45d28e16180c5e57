"""`orthokv serve`, `api`, `migrate` and `jobs ...`.

Exit codes: 0 done, 2 bad input (also when a job's model, dataset or settings turned out to be so), 3 budget unreachable,
1 anything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

from app.auth.keys import key_id_of
from app.client import Client, DigestMismatch, Refused, Unreachable
from app.starting import BAD_INPUT, FAILED, starting, stop
from app.watch import show, summary

BUDGET_UNREACHABLE = 3
# Why a job failed that is not its input's fault; other codes are.
OURS = {"storage_error", "out_of_memory", "worker_lost", "internal"}

jobs = typer.Typer(help="Submit and follow jobs of a running service.", no_args_is_help=True)

Url = Annotated[str, typer.Option(envvar="ORTHOKV_URL", help="The service.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File that holds the API key. By default the key is taken from ORTHOKV_API_KEY."),
]
JobId = Annotated[str, typer.Argument(metavar="ID")]
DEFAULT_URL = "http://127.0.0.1:8000"


class Method(StrEnum):
    stiefel = "stiefel"
    eigen = "eigen"
    weighted = "weighted"
    oblique = "oblique"


class Sharing(StrEnum):
    head = "head"
    tied = "tied"
    pair = "pair"
    quad = "quad"
    joint = "joint"
    auto = "auto"


class KeyMode(StrEnum):
    pre = "pre"
    post = "post"


class Parameterisation(StrEnum):
    direct = "direct"
    predictor = "predictor"


class Form(StrEnum):
    adapter = "adapter"
    full = "full"


def _api_key(file: Path | None) -> str | None:
    """The key of the file, or else of the environment; never an argument, which other users can list."""
    if file is not None:
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise stop(f"cannot read a key from {file}", BAD_INPUT) from error
        place = str(file)
    elif (value := os.environ.get("ORTHOKV_API_KEY")) is not None:
        key, place = value.strip(), "ORTHOKV_API_KEY"
    else:
        return None
    if key_id_of(key) is None:
        raise stop(f"{place} holds no API key: one begins with okv_", BAD_INPUT)
    return key


@contextmanager
def _connected(url: str, key_file: Path | None) -> Iterator[Client]:
    """A client whose failures become one line and an exit code."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise stop(f"{url!r} is not the URL of a server, such as {DEFAULT_URL}", BAD_INPUT)
    try:
        with Client(url, api_key=_api_key(key_file)) as client:
            yield client
    except Refused as error:
        raise stop(str(error), BAD_INPUT if error.status < 500 else FAILED) from error
    except (Unreachable, DigestMismatch, OSError) as error:
        raise stop(str(error), FAILED) from error


def _announce(url: str) -> None:
    typer.echo(f"OrthoKV listening on {url}")


def serve(
    data: Annotated[Path, typer.Option(help="Folder of the database and of all files.")] = Path(
        "orthokv-data"
    ),
    host: Annotated[
        str, typer.Option(help="Beyond the loopback, keys are needed: `orthokv keys create`.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    worker: Annotated[bool, typer.Option(help="Run jobs, too.")] = True,
) -> None:
    """Run the service on this machine: API, worker, database and files, no other server needed."""
    from app import embedded  # not for `orthokv jobs`, which is to start fast
    from app.auth.exposure import Exposed, others_can_reach, require_auth
    from app.settings import Settings

    with starting(embedded.FolderInUse, Exposed):
        settings = Settings(data_dir=data, allow_local_models=True)
        alone = others_can_reach(settings, host) is None
        if alone and "auth_required" not in settings.model_fields_set:
            settings = settings.model_copy(update={"auth_required": False})
        require_auth(settings, host)
        embedded.run(settings, host=host, port=port, worker=worker, announce=_announce)


def api(
    host: Annotated[
        str, typer.Option(help="Beyond the loopback, keys are needed: `orthokv keys create`.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
) -> None:
    """Run the API of a fleet; `orthokv worker` runs the jobs. ORTHOKV_* variables name database and store."""
    from app.auth.exposure import Exposed, require_auth, require_key
    from app.logs import configure
    from app.main import create_app
    from app.metrics.port import api_metrics
    from app.migrate import require_schema
    from app.server import bound, leave_on_signals
    from app.server import serve as serve_api
    from app.settings import Settings
    from app.storage import open_storage
    from app.tracing import configure as configure_tracing

    with starting(Exposed):
        settings = Settings()
        require_auth(settings, host)
        require_schema(settings.resolved_database_url)
        require_key(settings, host)
        open_storage(settings)
        configure()
        configure_tracing("orthokv-api")
        with bound(host, port) as listening, api_metrics(settings):
            leave_on_signals()
            serve_api(create_app(settings), listening, host=host, announce=_announce)


def migrate() -> None:
    """Bring the database of ORTHOKV_DATABASE_URL to this version's schema."""
    from app.migrate import upgrade
    from app.settings import Settings

    with starting():
        upgrade(Settings().resolved_database_url)


@jobs.command()
def submit(
    model: Annotated[str, typer.Option(help="A local folder or a hub id.")],
    dataset: Annotated[
        list[str], typer.Option(help="A file, or `self`. Given several times: a mixture in equal parts.")
    ],
    kept: Annotated[float | None, typer.Option(help="Budget: share of cache bytes to keep.")] = None,
    layer_error: Annotated[float | None, typer.Option(help="Budget: error of the worst layer.")] = None,
    perplexity_increase: Annotated[float | None, typer.Option(help="Budget: relative increase.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    method: Method = Method.oblique,
    sharing: Sharing = Sharing.joint,
    key_mode: KeyMode = KeyMode.pre,
    parameterisation: Parameterisation = Parameterisation.direct,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps per layer.")] = None,
    refine_steps: Annotated[
        int | None, typer.Option(help="Steps of the last stage, all layers together; 0 leaves it out.")
    ] = None,
    num_samples: int = 64,
    sequence_length: int = 1024,
    positions: Annotated[
        int | None,
        typer.Option(
            help="Key mode post: positions to calibrate over. Default: the model's longest context."
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Where a JSONL or Parquet row has its text.")] = "text",
    dataset_format: Annotated[
        str | None, typer.Option("--format", help="jsonl, text or parquet; by default from the file's name.")
    ] = None,
    form: Form = Form.adapter,
    rank_multiple: Annotated[int, typer.Option(help="Every rank is a multiple of this.")] = 1,
    seed: int = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """Send a job; prints its id."""
    budgets = {"kept": kept, "layer_error": layer_error, "perplexity_increase": perplexity_increase}
    given = [(metric, value) for metric, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise stop("give exactly one of --kept, --layer-error, --perplexity-increase", BAD_INPUT)
    for name in dataset:
        if name != "self" and not Path(name).is_file():
            raise stop(f"{name} is not a file", BAD_INPUT)
    body: dict[str, Any] = {
        "model": {"id": _model_id(model), "revision": revision},
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
        "seed": seed,
    }
    with _connected(url, api_key_file) as client:
        texts = [
            {"source": "self"}
            if name == "self"
            else {"id": client.upload(Path(name), kind=dataset_format), "field": field}
            for name in dataset
        ]
        amount = {"num_samples": num_samples, "sequence_length": sequence_length, "also": texts[1:]}
        job = client.call("POST", "/v1/jobs", json={**body, "dataset": {**texts[0], **amount}})
        typer.echo(job["id"])
        if wait:
            _follow(client, job["id"])


@jobs.command()
def watch(job_id: JobId, url: Url = DEFAULT_URL, api_key_file: KeyFile = None) -> None:
    """Follow a job to its end."""
    with _connected(url, api_key_file) as client:
        _follow(client, job_id)


@jobs.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs of this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """List jobs, newest first."""
    wanted = {"status": status, "model": model, "limit": limit}
    query = {name: value for name, value in wanted.items() if value is not None}
    with _connected(url, api_key_file) as client:
        for job in client.call("GET", "/v1/jobs", params=query)["data"]:
            budget = job["spec"]["budget"]
            asked = f"{budget['metric']}={budget['value']:g}"
            # A job from a stored profile names no model.
            subject = job["spec"]["model"]["id"] if "model" in job["spec"] else job["spec"]["profile_id"]
            typer.echo(
                f"{job['id']}  {job['created_at']}  {job['status']:<10}  {job['phase']:<12}  {asked}  {subject}"
            )


@jobs.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key_file: KeyFile = None) -> None:
    """Ask for the end of a job."""
    with _connected(url, api_key_file) as client:
        typer.echo(client.call("POST", f"/v1/jobs/{job_id}/cancel")["status"])


@jobs.command()
def download(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoint.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for the profile's files.")] = None,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """Fetch the checkpoint of a job, its profile, or both. Broken downloads resume; every file is checked."""
    if out is None and profile is None:
        raise stop("say where to: --out DIR, --profile DIR, or both", BAD_INPUT)
    with _connected(url, api_key_file) as client:
        result = client.call("GET", f"/v1/jobs/{job_id}")["result"] or {}
        if out is not None:
            found = _made(result, "checkpoint", job_id)
            _download(client, client.call("GET", f"/v1/checkpoints/{found}/files")["data"], out)
        if profile is not None:
            found = _made(result, "profile", job_id)
            files = client.call("GET", f"/v1/profiles/{found}")["files"]
            _download(client, list(files.values()), profile)


def _follow(client: Client, job_id: str) -> None:
    job = show(client.follow(job_id), Console())
    ok = job["status"] == "succeeded"
    for line in summary(job):
        typer.echo(line, err=not ok)
    if not ok:
        raise typer.Exit(_exit_code(job["error"]))


def _exit_code(error: dict[str, Any] | None) -> int:
    if error is None or error["code"] in OURS:  # cancelled, or none of the input's fault
        return FAILED
    return BUDGET_UNREACHABLE if error["code"] == "budget_unreachable" else BAD_INPUT


def _download(client: Client, artifacts: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for artifact in artifacts:
        typer.echo(str(client.download(artifact, folder)))


def _made(result: dict[str, Any], what: str, job_id: str) -> str:
    found: str | None = result.get(f"{what}_id")
    if found is None:
        raise stop(f"{job_id} has made no {what}", BAD_INPUT)
    return found


def _model_id(model: str) -> str:
    """A folder as the service has to see it, or a hub id as it is."""
    path = Path(model)
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith("."):
        raise stop(f"{model} is not a folder", BAD_INPUT)
    return model
