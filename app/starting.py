"""How commands end that cannot begin: one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from pydantic import ValidationError

FAILED, BAD_INPUT = 1, 2


def stop(message: str, code: int) -> typer.Exit:
    """Raise what this returns."""
    typer.echo(f"orthokv: {message}", err=True)
    return typer.Exit(code)


@contextmanager
def starting(*refusals: type[Exception]) -> Iterator[None]:
    """What keeps a server or worker from starting becomes one line; `refusals` are the command's own.

    What a command of the service writes is its user's alone, whatever his umask.
    """
    from sqlalchemy.exc import SQLAlchemyError  # `orthokv jobs` is to start fast

    from app.infra.database import DatabaseUnusable
    from app.infra.private import private_files
    from app.infra.storage import StorageError
    from app.infra.tracing import TracingUnusable
    from app.migrate import SchemaBehind

    unusable: tuple[type[Exception], ...] = (
        DatabaseUnusable,
        SchemaBehind,
        StorageError,
        TracingUnusable,
        *refusals,
    )
    try:
        with private_files():
            yield
    except ValidationError as error:
        first = error.errors()[0]
        raise stop(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}", BAD_INPUT) from error
    except ModuleNotFoundError as error:
        if error.name not in ("celery", "kombu", "redis"):
            raise
        raise stop("ORTHOKV_BROKER_URL needs pip install 'orthokv[broker]'", BAD_INPUT) from error
    except SQLAlchemyError as error:
        raise stop(f"database: {str(error).partition(chr(10))[0]}", FAILED) from error
    except unusable as error:
        raise stop(str(error), BAD_INPUT) from error
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        raise stop(f"cannot start: {named}{error.strerror or error}", BAD_INPUT) from error
