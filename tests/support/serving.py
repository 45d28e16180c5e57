"""The API behind a real socket, by the server that the product uses, and files for it to hand out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import update

from app.artifacts.models import Artifact
from app.artifacts.repository import files_of_job
from app.http.sendfile import ZeroCopyProtocol
from app.infra.database import SyncDatabase
from app.infra.storage import open_storage
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.server import bound
from app.settings import Settings
from tests.support.factories import finish, must_claim, queue_job
from tests.support.orthokv_server import until


@contextlib.contextmanager
def listening(app: Any, **more: Any) -> Iterator[str]:
    """Serve an application from a thread; its URL."""
    options = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 1, **more}
    with bound("127.0.0.1", 0) as socket:
        server = uvicorn.Server(uvicorn.Config(app, http=ZeroCopyProtocol, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            until(lambda: server.started, "the server starts")
            yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The API of these settings; its URL."""
    with listening(create_app(settings.model_copy(update={"allowed_hosts": ("127.0.0.1",)}))) as url:
        yield url


def planted(settings: Settings, content: bytes, scratch: Path) -> str:
    """The id of a committed artifact, `blocks.safetensors`, that holds this."""
    database = SyncDatabase(settings.resolved_database_url)
    try:
        job_id = queue_job(database).id
        finish(database, must_claim(database))
        finish(database, must_claim(database))
        row = database.read(files_of_job, job_id, StepName.CALIBRATE)["blocks.safetensors"]
        file = scratch / "content"
        file.write_bytes(content)
        stored = open_storage(settings).put_file(row.object_key, file)
        file.unlink()
        values = {"bytes": stored.bytes, "sha256": stored.sha256}
        database.write(
            lambda session: session.execute(update(Artifact).where(Artifact.id == row.id).values(values))
        )
        return row.id
    finally:
        database.close()
