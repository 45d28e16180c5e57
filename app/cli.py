"""`orthokv serve`, `api` and `migrate`. Exit codes: 0 done, 2 bad input, 1 anything else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.starting import starting

if TYPE_CHECKING:
    from app.settings import Settings


def _announce(url: str, settings: Settings) -> None:
    from app.auth.owner import TOKEN_FILE

    typer.echo(f"OrthoKV listening on {url}")
    if settings.auth_required:
        return
    if sys.stdout.isatty():
        typer.echo(f"Its pages: {url}/docs?token={settings.token.get_secret_value()}")
    else:  # the output is kept in a file, which others may be able to read
        typer.echo(f"Its pages: {url}/docs?token=..., with the token of {settings.data_dir / TOKEN_FILE}")


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
        settings = Settings(data_dir=data)
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
    from app.infra.logs import configure
    from app.infra.private import make_private
    from app.infra.storage import open_storage
    from app.infra.tracing import configure as configure_tracing
    from app.metrics.port import api_metrics
    from app.migrate import require_schema
    from app.server import bound, leave_on_signals, serve_admitted
    from app.settings import Settings

    with starting(Exposed):
        settings = Settings()
        require_auth(settings, host)
        require_schema(settings.resolved_database_url)
        require_key(settings, host)
        configure()
        make_private(settings)
        open_storage(settings)
        configure_tracing("orthokv-api")
        with bound(host, port) as listening, api_metrics(settings):
            leave_on_signals()
            serve_admitted(settings, listening, host=host, announce=_announce)


def migrate() -> None:
    """Bring the database of ORTHOKV_DATABASE_URL to this version's schema."""
    from app.migrate import upgrade
    from app.settings import Settings

    with starting():
        upgrade(Settings().resolved_database_url)
