"""`orthokv keys ...` and `orthokv projects ...`: for whoever can reach the database itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from sqlalchemy.orm import Session

from app.auth import repository
from app.auth.models import ApiKey, Project
from app.deletion.service import delete_project
from app.http.errors import Problem
from app.http.pagination import Cursor
from app.infra.database import SyncDatabase
from app.migrate import upgrade
from app.principal import Principal, Scope
from app.projects import service
from app.projects.schemas import ApiKeyCreate, ProjectCreate
from app.settings import Settings
from app.starting import BAD_INPUT, starting, stop

projects = typer.Typer(help="List and delete projects, directly in the database.", no_args_is_help=True)
Row = TypeVar("Row", ApiKey, Project)

keys = typer.Typer(help="Make, list and revoke API keys, directly in the database.", no_args_is_help=True)

Data = Annotated[
    Path | None, typer.Option(help="Data folder of the server, when ORTHOKV_DATABASE_URL is not set.")
]


@keys.command()
def create(
    scope: Annotated[list[Scope], typer.Option(help="What the key may do; give it several times.")],
    project: Annotated[str, typer.Option(help="Name of the project.")] = "default",
    new_project: Annotated[bool, typer.Option("--new-project", help="Make the project, too.")] = False,
    name: Annotated[str, typer.Option(help="A label.")] = "cli",
    expires_in_days: Annotated[float | None, typer.Option(min=0.001, max=3650)] = None,
    data: Data = None,
) -> None:
    """Make a key. It alone goes to standard output, this once."""
    settings = _settings(data, make=True)

    def make(session: Session) -> tuple[str, str]:
        found = repository.project_named(session, project)
        if found is None and not new_project:
            raise stop(f"there is no project '{project}'; --new-project makes it", BAD_INPUT)
        principal = Principal("", "cli", frozenset(Scope))
        project_id = (
            service.create_project(session, body=ProjectCreate(name=project), principal=principal).id
            if found is None
            else found.id
        )
        body = ApiKeyCreate(name=name, scopes=scope, project_id=project_id, expires_in_days=expires_in_days)
        pepper = settings.key_pepper.get_secret_value()
        made = service.create_key(session, body=body, principal=principal, pepper=pepper)
        return made.id, made.key

    with _database(settings) as database:
        key_id, text = database.write(make)
    typer.echo(f"{key_id} of project {project}; this is the only time that the key is shown", err=True)
    typer.echo(text)


@keys.command("list")
def list_keys(data: Data = None) -> None:
    """List the keys of all projects, newest first, without their secrets."""

    def read(session: Session) -> list[str]:
        lines: list[str] = []
        for row in _every(lambda cursor: repository.list_keys(session, cursor, project_id=None)):
            project = repository.get_project(session, row.project_id)
            assert project is not None, "foreign keys keep a key's project"
            state = "revoked" if row.revoked_at else f"expires {row.expires_at or 'never'}"
            lines.append(f"{row.id}  {project.name}  {row.name}  {','.join(row.scopes)}  {state}")
        return lines

    with _database(_settings(data)) as database:
        for line in database.read(read):
            typer.echo(line)


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")], data: Data = None) -> None:
    """End a key, from its next request on."""
    principal = Principal("", "cli", frozenset(Scope))
    with _database(_settings(data)) as database:
        database.write(service.revoke_key, key_id=key_id, principal=principal)
    typer.echo(f"{key_id} revoked")


def _every(one_page: Callable[[Cursor], tuple[list[Row], bool]]) -> Iterator[Row]:
    """The rows of all pages, newest first."""
    cursor, more = Cursor(limit=100), True
    while more:
        rows, more = one_page(cursor)
        yield from rows
        cursor = Cursor(after=rows[-1].id if rows else None, limit=100)


def _settings(data: Path | None, *, make: bool = False) -> Settings:
    with starting():
        settings = Settings() if data is None else Settings(data_dir=data)
        if make and not settings.database_url:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
    if not settings.database_url and not settings.data_dir.is_dir():
        raise stop(
            f"{settings.data_dir} is not a data folder; name it by --data, or set ORTHOKV_DATABASE_URL",
            BAD_INPUT,
        )
    return settings


@contextmanager
def _database(settings: Settings) -> Iterator[SyncDatabase]:
    """The migrated database; failures become one line and an exit code."""
    with starting(Problem):
        upgrade(settings.resolved_database_url)
        database = SyncDatabase(settings.resolved_database_url)
        try:
            yield database
        finally:
            database.close()


@projects.command("list")
def list_projects(data: Data = None) -> None:
    """List the projects, newest first."""

    def read(session: Session) -> list[str]:
        rows = _every(lambda cursor: repository.list_projects(session, cursor))
        return [f"{row.id}  {row.name}  {row.created_at}" for row in rows]

    with _database(_settings(data)) as database:
        for line in database.read(read):
            typer.echo(line)


@projects.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    yes: Annotated[bool, typer.Option("--yes", help="Needed: nothing brings the project back.")] = False,
    data: Data = None,
) -> None:
    """Erase a project: its keys, jobs, datasets and every file. The bytes go with a server's next sweep."""
    if not yes:
        raise stop(f"this erases everything of project '{name}'; say --yes", BAD_INPUT)
    principal = Principal("", "cli", frozenset(Scope))
    with _database(_settings(data)) as database:
        database.write(delete_project, name=name, principal=principal)
    typer.echo(f"project {name} deleted")
