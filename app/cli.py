"""`orthokv serve`, `api` and `migrate`. Exit codes: 0 done, 2 bad input, 1 anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.starting import starting


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
    from app.infra.logs import configure
    from app.infra.storage import open_storage
    from app.infra.tracing import configure as configure_tracing
    from app.main import create_app
    from app.metrics.port import api_metrics
    from app.migrate import require_schema
    from app.server import bound, leave_on_signals
    from app.server import serve as serve_api
    from app.settings import Settings

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
