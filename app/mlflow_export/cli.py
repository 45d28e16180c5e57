"""`orthokv mlflow-export`: follows a service and tells MLflow."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Annotated

import structlog
import typer

from app.starting import BAD_INPUT, FAILED, stop
from orthokv_client import ApiError, Unreachable
from orthokv_client.cli import KeyFile, Url, connected
from orthokv_client.protocol import DEFAULT_URL

if TYPE_CHECKING:
    from app.mlflow_export.export import Exporter

_REGISTERED_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
# This loop tries again by itself; the client's own patience would be minutes a request.
_CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def mlflow_export(
    tracking_uri: Annotated[
        str,
        typer.Option(
            envvar=["ORTHOKV_MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_URI"],
            help="The MLflow server; its credentials are those of MLFLOW_TRACKING_*.",
        ),
    ],
    experiment: Annotated[str, typer.Option(help="Made where it is missing.")] = "orthokv",
    register: Annotated[
        bool, typer.Option(help="Register checkpoints as model versions, by URI: nothing is copied.")
    ] = True,
    model_name: Annotated[
        str | None, typer.Option(help="One registered model for all; by default one for each base model.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="Move this alias to the model version that finished last.")
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(help="The service as readers of MLflow reach it; by default --url.")
    ] = None,
    days: Annotated[float, typer.Option(min=0, help="Leave jobs alone that are older than this.")] = 30.0,
    every: Annotated[float, typer.Option(min=1, help="Seconds between looks at the service.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once: 0 all is there, 1 not all.")] = False,
    url: Url = DEFAULT_URL,
    api_key_file: KeyFile = None,
) -> None:
    """Keep one MLflow run for each ended job of a service, until stopped. It may be killed and started again at any time."""
    if not tracking_uri.startswith(("http://", "https://")):
        raise stop("--tracking-uri must be the http(s) URL of an MLflow server", BAD_INPUT)
    for option, value in (("--model-name", model_name), ("--alias", alias)):
        if value is not None and not _REGISTERED_NAME.fullmatch(value):
            raise stop(f"{option} must be letters, digits, '.', '_' and '-'", BAD_INPUT)
    for variable, value in _CLIENT.items():
        os.environ.setdefault(variable, value)
    try:
        from app.mlflow_export.export import Exporter, Options
    except ModuleNotFoundError as error:
        raise stop(
            f"mlflow-export needs pip install 'orthokv[mlflow]' ({error.name} is not installed)", BAD_INPUT
        ) from error
    from app.infra.logs import configure

    configure()
    options = Options(
        public_url=(public_url or url).rstrip("/"),
        experiment=experiment,
        register=register,
        model_name=model_name,
        alias=alias,
        days=days,
    )
    with connected(url, api_key_file) as client:
        exporter = Exporter(client, tracking_uri, options)
        while True:
            complete = _look(exporter)
            if once:
                raise typer.Exit(0 if complete else FAILED)
            time.sleep(every)


def _look(exporter: Exporter) -> bool:
    """One sweep; whether MLflow has all. Neither side being away ends the loop; a key that is refused does."""
    from app.mlflow_export.export import TrackingAway

    log = structlog.get_logger()
    try:
        swept = exporter.sweep()
    except ApiError as error:
        if error.status in (401, 403):
            raise
        log.warning("mlflow.service_refused", status=error.status)
        return False
    except Unreachable:
        log.warning("mlflow.service_away")
        return False
    except TrackingAway as error:
        log.warning("mlflow.away", error=str(error))
        return False
    log.info("mlflow.swept", exported=swept.exported, failed=swept.failed)
    return swept.failed == 0
