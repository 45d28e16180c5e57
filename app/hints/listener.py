"""Hears hints: a Celery worker in a thread of the supervisor, whose one task is to look for work.

The task lasts as long as there is work, so that a busy worker takes no second hint and the queue wakes idle
ones. Everything that matters happens in the supervisor's own loop, which looks at the database without hints,
too: when this thread or the broker is gone, work begins `idle_poll_seconds` later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog
from celery.app.trace import setup_worker_optimizations
from celery.worker import WorkController
from kombu import Queue

from app.hints.broker import TASK, make_celery, queue_of
from app.infra.compat import celery_state

RESTART_SECONDS = 5.0
STOP_SECONDS = 5.0

log = structlog.get_logger(__name__)


class HintListener:
    """Calls `work` for each hint of these classes, one at a time. At most one in a process."""

    def __init__(self, url: str, *, name: str, gpu_classes: Sequence[str], work: Callable[[], None]) -> None:
        self._app = make_celery(url)
        queues = [queue_of(gpu_class) for gpu_class in gpu_classes]
        # Without acks: when the connection breaks during one, the consumer would wait for it and hear no more.
        self._app.conf.task_queues = [
            Queue(queue, exchange="", routing_key=queue, no_ack=True) for queue in queues
        ]
        self._app.task(name=TASK, shared=False)(work)
        self._name = name
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen_until_stopped, name="hints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Hear nothing any more. `work` must have been told to return."""
        self._ended.set()
        celery_state().should_terminate = 0
        self._thread.join(STOP_SECONDS)
        celery_state().should_terminate = None

    def _listen_until_stopped(self) -> None:
        setup_worker_optimizations(
            self._app, self._name
        )  # else the task is looked for in another application
        while not self._ended.is_set():
            controller = WorkController(
                app=self._app,
                hostname=f"{self._name}@orthokv",
                pool="solo",
                concurrency=1,
                without_heartbeat=True,
                without_mingle=True,
                without_gossip=True,
            )
            controller.start()  # returns when it is told to stop, and on errors that it does not survive
            if not self._ended.is_set():
                log.error("hints.deaf", again_in_seconds=RESTART_SECONDS)
                self._ended.wait(RESTART_SECONDS)
