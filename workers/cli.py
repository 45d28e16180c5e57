"""`orthokv worker`: one worker of a fleet."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def worker(
    gpu_class: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu-class",
            "--queue",
            help="Run only jobs of this class; may be given several times. Default: ORTHOKV_GPU_CLASSES.",
        ),
    ] = None,
    poll_only: Annotated[
        bool, typer.Option("--poll-only", help="Find work without a broker, even where one is set.")
    ] = False,
) -> None:
    """Run jobs of the database and object store that ORTHOKV_* variables name, until SIGTERM.

    SIGTERM drains: the layer in hand is finished if time allows, and the step goes to the next worker.
    """
    from app.migrate import require_schema
    from app.settings import Settings
    from app.starting import starting  # not for the other commands of `orthokv`, which are to start fast
    from workers.limits import CannotIsolate
    from workers.supervisor import run

    told: dict[str, Any] = {}
    if gpu_class:
        told["gpu_classes"] = tuple(gpu_class)
    if poll_only:
        told["broker_url"] = ""
    with starting(CannotIsolate):
        settings = Settings(**told)
        require_schema(settings.resolved_database_url)
        run(settings)
