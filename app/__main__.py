"""`python -m app api`, `migrate`, `check`, `keys` and `projects`: the API's commands where the library is not installed."""

from __future__ import annotations

import typer

from app.checker.cli import check
from app.cli import api, migrate
from app.projects.cli import keys, projects

commands = typer.Typer(help="The API of OrthoKV.", no_args_is_help=True, add_completion=False)
commands.command()(api)
commands.command()(migrate)
commands.command()(check)
commands.add_typer(keys, name="keys")
commands.add_typer(projects, name="projects")

if __name__ == "__main__":
    commands()
