"""The port on which Prometheus reads a process: apart from the API, so that a proxy never publishes it.

It asks for no key: what it tells are numbers without ids, names or paths. Off unless a port is set, and on the
loopback unless an address is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

from app.auth.exposure import is_loopback
from app.infra.counted import REGISTRY
from app.metrics.stored import StoredMetrics
from app.settings import Settings

log = structlog.get_logger(__name__)

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@contextmanager
def api_metrics(settings: Settings) -> Iterator[int | None]:
    """Show an API's metrics while open, with those of the database; gives the port. `OSError`: it is taken."""
    if settings.metrics_port is None:
        yield None
        return
    stored = StoredMetrics(settings.resolved_database_url, settings.gpu_classes)
    registry = CollectorRegistry()
    registry.register(REGISTRY)
    registry.register(stored)
    try:
        with _shown(registry, settings.metrics_host, settings.metrics_port) as port:
            yield port
    finally:
        stored.close()


@contextmanager
def worker_metrics(settings: Settings) -> Iterator[int | None]:
    """Show a worker's metrics while open. Raises `OSError`."""
    if settings.worker_metrics_port is None:
        yield None
        return
    with _shown(REGISTRY, settings.metrics_host, settings.worker_metrics_port) as port:
        yield port


@contextmanager
def _shown(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    server, thread = start_http_server(port, addr=host, registry=registry)
    app: WsgiApp = make_wsgi_app(registry)
    server.set_app(_local_only(app) if is_loopback(host) else app)
    log.info("metrics.shown", host=host, port=server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _local_only(app: WsgiApp) -> WsgiApp:
    """Refuse names that were made to resolve to the loopback: a browser's page could read along."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            host = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname
        except ValueError:
            host = None
        if host is None or not is_loopback(host):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"This server does not answer to that host name.\n"]
        return app(environ, start_response)

    return guarded
