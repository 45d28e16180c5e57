"""The application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI

import app.artifacts.routes
import app.audit.routes
import app.auth.docs
import app.checkpoints.routes
import app.costs.routes
import app.datasets.routes
import app.deletion.routes
import app.http.health
import app.jobs.event_routes
import app.jobs.routes
import app.profiles.routes
import app.projects.routes
import app.quotas.routes
import app.webhooks.routes
from app.audit.window import NotedOnce
from app.auth.rate import RateLimit
from app.hints.dispatch import make_dispatcher
from app.http import errors
from app.http.middleware import LocalOnly, PlainQueries, RequestIds
from app.http.openapi import API_VERSION, describe
from app.infra import failpoints, tracing
from app.infra.database import Database, SyncDatabase, Timeouts
from app.infra.outbound import Outbound
from app.infra.sealing import make_sealer
from app.infra.storage import open_storage
from app.jobs.event_routes import StreamSlots
from app.jobs.waiting import JobWatch
from app.metrics.requests import Requests
from app.reaper import Reaper
from app.settings import Settings
from app.webhooks.sender import Sender

DESCRIPTION = """Calibration as a service for KV-cache compression.

POST a model, a calibration dataset and an error budget; get the error-rank profile of every layer and a
compressed checkpoint. Every answer that is not a success is `application/problem+json` with a `code` of a
closed list."""


@asynccontextmanager
async def _lifespan(api: FastAPI) -> AsyncIterator[None]:
    settings: Settings = api.state.settings
    failpoints.arm(settings.failpoint, settings.failpoint_dir)
    url = settings.resolved_database_url
    timeouts = Timeouts(settings.statement_timeout_seconds, settings.lock_timeout_seconds)
    api.state.database = Database(url, timeouts)
    api.state.watch = JobWatch(api.state.database, settings.poll_seconds)
    api.state.storage = open_storage(settings)
    api.state.dispatcher = make_dispatcher(settings)
    repairs = SyncDatabase(url, timeouts)
    reaper = Reaper(repairs, api.state.storage, api.state.dispatcher, settings)
    sender = Sender(repairs, api.state.sealer, api.state.outbound, settings)
    reaper.start()
    sender.start()
    try:
        yield
    finally:
        await api.state.watch.close()
        await to_thread.run_sync(reaper.stop)
        await to_thread.run_sync(sender.stop)
        await to_thread.run_sync(api.state.dispatcher.close)
        repairs.close()
        await api.state.database.close()


def create_app(settings: Settings) -> FastAPI:
    """An application over a migrated database. Several may run side by side on one database."""
    api = FastAPI(
        title="OrthoKV",
        version=API_VERSION,
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,  # ours: app.auth.docs
        openapi_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Spans of requests, where `tracing.configure` has set up an exporter; metrics and logs are our own.
        telemetry={
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": tracing.is_probe,
        },
    )
    api.state.settings = settings
    api.state.streams = StreamSlots(settings.max_event_streams, settings.max_event_streams_per_key)
    api.state.downloads = NotedOnce()
    api.state.rate_limit = RateLimit(settings.rate_limit_requests, settings.rate_limit_window_seconds)
    api.state.sealer = make_sealer(settings)
    api.state.outbound = Outbound(
        private_hosts=settings.outbound_private_hosts, timeout_seconds=settings.webhook_timeout_seconds
    )
    errors.install(api)
    api.add_middleware(PlainQueries)
    api.add_middleware(LocalOnly, allowed_hosts=settings.allowed_hosts)
    api.add_middleware(Requests, log_requests=settings.log_requests)
    api.add_middleware(RequestIds)  # added last, so outermost: refusals have an id, too
    for router in (
        app.datasets.routes.router,
        app.datasets.routes.upload_router,
        app.jobs.routes.router,
        app.costs.routes.router,
        app.jobs.event_routes.router,
        app.profiles.routes.router,
        app.checkpoints.routes.router,
        app.artifacts.routes.router,
        app.deletion.routes.router,
        app.quotas.routes.router,
        app.projects.routes.projects,
        app.projects.routes.keys,
        app.audit.routes.router,
        app.webhooks.routes.router,
        app.http.health.router,
        app.auth.docs.router,
    ):
        api.include_router(router)
    describe(api)
    return api
