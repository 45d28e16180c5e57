"""Hints through Redis, by Celery. Imported only where there is a broker.

Redis carries nothing but "look at the database": losing every key costs the time until workers look anyway,
and a message that comes twice costs a query.
"""

from __future__ import annotations

import threading

import structlog
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from app.settings import DEFAULT_GPU_CLASS

TASK = "orthokv.claim"
CONNECT_SECONDS = 2.0
CLOSE_SECONDS = 5.0
# A hint that nobody took in this time is not news: whoever comes later looks at the database first.
HINT_LIFE_SECONDS = 60

log = structlog.get_logger(__name__)


def queue_of(gpu_class: str) -> str:
    return f"orthokv.{gpu_class}"


def make_celery(url: str) -> Celery:
    """The application of both sides.

    No prefetch, and no ack that comes late: Redis would deliver such a message again after the visibility
    timeout. A lost message is the reaper's work, not the broker's.
    """
    app = Celery("orthokv", broker=url, set_as_current=False)
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        event_serializer="json",
        accept_content=["json"],
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,  # a cancel travels through the database, with the heartbeat
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": "orthokv:",
            "visibility_timeout": 3600,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_timeout": 30,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app


class CeleryDispatcher:
    """Publishes hints from a thread of its own, so that a broker that is away holds up nobody.

    Waiting hints of one class are one hint, which also bounds what an outage can pile up. A hint that cannot
    be sent is dropped: workers look at the database without it, and the reaper hints again.
    """

    def __init__(self, url: str) -> None:
        self._app = make_celery(url)
        # Without these, publishing waits for a broker that is away for as long as it is.
        self._app.conf.broker_transport_options |= {"socket_timeout": CONNECT_SECONDS, "max_retries": 0}
        self._waiting: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._reachable = True
        self._thread = threading.Thread(target=self._publish_until_closed, name="hints", daemon=True)
        self._thread.start()

    def hint(self, gpu_class: str = DEFAULT_GPU_CLASS) -> None:
        with self._changed:
            self._waiting.add(gpu_class)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)

    def _publish_until_closed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    break
                gpu_class = self._waiting.pop()
            self._publish(gpu_class)
        self._app.close()

    def _publish(self, gpu_class: str) -> None:
        try:
            self._app.send_task(
                TASK,
                # By its name alone, through no exchange: a table of bindings would be lost with the keys.
                queue=Queue(queue_of(gpu_class), exchange="", routing_key=queue_of(gpu_class)),  # type: ignore[arg-type]
                expires=HINT_LIFE_SECONDS,
                ignore_result=True,
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0, "interval_step": 0},
            )
        except (OperationalError, OSError) as error:
            if self._reachable:
                log.warning("hints.unreachable", error=str(error).partition("\n")[0])
            self._reachable = False
        except Exception:  # the thread is all that sends hints: it may lose one, not end
            log.exception("hints.failed")
        else:
            if not self._reachable:
                log.info("hints.reachable_again")
            self._reachable = True
