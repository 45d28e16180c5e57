"""`orthokv check`: does the database keep its promises, and does the store agree?"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer


def check(
    data: Annotated[
        Path | None, typer.Option(help="Data folder of the server, when ORTHOKV_DATABASE_URL is not set.")
    ] = None,
    orphan_hours: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Report objects without a row that are older. Default: what the sweep should have deleted.",
        ),
    ] = None,
) -> None:
    """Check every row and every stored byte, beside a running service or without one.

    One line on standard output for each violation; exit code 1 when there are any.
    """
    from app.checker import checks
    from app.infra.database import SyncDatabase
    from app.infra.storage import open_storage
    from app.migrate import require_schema
    from app.settings import Settings
    from app.starting import BAD_INPUT, FAILED, starting, stop

    with starting():
        settings = Settings() if data is None else Settings(data_dir=data)
        if not settings.database_url and not settings.data_dir.is_dir():
            raise stop(
                f"{settings.data_dir} is not a data folder; name it by --data, or set ORTHOKV_DATABASE_URL",
                BAD_INPUT,
            )
        url = settings.resolved_database_url
        require_schema(url)
        if orphan_hours is None:
            # One round of the sweep may still be to come.
            orphan_hours = settings.orphan_hours + 2 * settings.orphan_sweep_seconds / 3600
        database = SyncDatabase(url)
        try:
            report = checks.check(database, open_storage(settings), orphan_age=timedelta(hours=orphan_hours))
        finally:
            database.close()
    for violation in report.violations:
        typer.echo(str(violation))
    typer.echo(
        f"{report.jobs} jobs, {report.events} events, {report.layers} layers, {report.objects} objects: "
        f"{len(report.violations)} violations",
        err=True,
    )
    if report.violations:
        raise typer.Exit(FAILED)
