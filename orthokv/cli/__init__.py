"""`orthokv`: the library from a terminal. Exit codes: 0 done, 2 bad input, 3 budget unreachable, 1 a bug."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from orthokv.cli.fit import compare, compress, plan
from orthokv.cli.output import out_console, stop
from orthokv.cli.serve import generate, push
from orthokv.cli.show import evaluate, inspect
from orthokv.compat import click_errors
from orthokv.spec.errors import BudgetUnreachable, InvalidSetting, OrthoKVError
from orthokv.spec.version import VERSION

ClickException, NoArgsIsHelpError = click_errors()
# On no index: installed from a folder of the repository.
_CLIENT = "orthokv_client"

app = typer.Typer(
    name="orthokv",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out_console.print(f"orthokv {VERSION}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make the KV cache of a language model several times smaller."""


for _command in (compress, evaluate, compare, plan, generate, inspect, push):
    app.command()(_command)


def _add_commands() -> None:
    """Commands of installed packages (the service adds `serve`, its client `jobs`); the library itself imports none of them."""
    entries = entry_points(group="orthokv.commands")
    for entry in entries:
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            # The library may be installed without the service's extras: say so when the command is used.
            _add_unavailable(entry.name, str(error.name).partition(".")[0])
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    if "jobs" not in entries.names:
        _add_unavailable("jobs", _CLIENT)


def _add_unavailable(name: str, missing: str) -> None:
    install = "./clients/python" if missing == _CLIENT else "'orthokv[server]'"

    def command() -> None:
        raise InvalidSetting(f"'orthokv {name}' needs pip install {install} ({missing} is not installed)")

    # Whatever it was given: the answer is the same.
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    about = f"Needs pip install {install} ({missing} is not installed)."
    app.command(name, help=about, context_settings=anything)(command)


def commands() -> list[Any]:
    """Every command that is installed, for the documentation: the library's own first, then the others by name."""
    own = len(app.registered_commands)
    _add_commands()
    group: Any = typer.main.get_command(app)
    found = list(group.commands.values())
    return [*found[:own], *sorted(found[own:], key=lambda command: str(command.name))]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _add_commands()
    try:
        code = app(arguments, standalone_mode=False)
    except BudgetUnreachable as error:
        stop(str(error), 3)
    except OrthoKVError as error:
        stop(str(error), 2)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except ClickException as error:
        # One line, where click itself would add the usage of the command.
        stop(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
