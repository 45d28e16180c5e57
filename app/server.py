"""One HTTP server process: a bound socket, its owner's token, an announcement, uvicorn."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from app.auth.owner import admitted
from app.http.sendfile import ZeroCopyProtocol
from app.main import create_app
from app.settings import Settings


class _AnnouncingServer(uvicorn.Server):
    """Calls back once requests are accepted."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # What is loaded by now lives as long as the process. A full collection looks at all of it, and holds up every
            # request for a tenth of a second.
            gc.collect()
            gc.freeze()
            self._on_ready()


def serve(api: FastAPI, listening: socket.socket, *, host: str, announce: Callable[[str], None]) -> None:
    """Serve on a bound socket until SIGINT or SIGTERM, and announce the URL."""
    config = uvicorn.Config(
        api,
        http=ZeroCopyProtocol,
        log_config=None,  # ours: app.infra.logs
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,  # waiting clients and open event streams do not hold up a stop
    )
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listening.getsockname()[1]}"
    _AnnouncingServer(config, lambda: announce(url)).run(sockets=[listening])


def serve_admitted(
    settings: Settings, listening: socket.socket, *, host: str, announce: Callable[[str, Settings], None]
) -> None:
    """Serve the API of these settings and, where keys alone do not decide, let its owner in by a token."""
    with admitted(settings, listening) as known:
        serve(create_app(known), listening, host=host, announce=lambda url: announce(url, known))


def leave_on_signals() -> None:
    """End by `SystemExit`: uvicorn stops by these signals, and raises them again once it has."""
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address. Raises `OSError` when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening
