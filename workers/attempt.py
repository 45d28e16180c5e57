"""One attempt at one step: run the child, store what it makes, and report how it ended."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import structlog

from app.hints.pipe import WakeListener
from app.infra import failpoints, tracing
from app.infra.counted import ATTEMPT_SECONDS, ATTEMPTS, LAYER_SECONDS, PEAK_MEMORY_BYTES
from app.infra.database import SyncDatabase
from app.infra.storage import Storage, StorageError
from app.jobs.commits import IncompleteResult, Produced, commit_layer, commit_progress, finish_step
from app.jobs.lease import (
    TIME_UP,
    WORKER_LOST,
    Failure,
    Lease,
    LeaseLost,
    RetryPolicy,
    acknowledge_cancel,
    fail,
    release,
)
from app.jobs.model_folders import FolderRefused
from app.jobs.vocabulary import JobErrorCode, StepName
from app.settings import Settings
from workers.child import Child
from workers.heartbeat import Heartbeat, Stop
from workers.limits import Excess, Limits
from workers.orders import load_order, prepare
from workers.protocol import Error, File, Progress, ProtocolError, Request, Result, Usage

MAX_MESSAGE_CHARACTERS = 2_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Done:
    """The step's result and the files that become visible with it."""

    data: dict[str, Any]
    files: list[Produced]


class Attempt:
    """A claimed step on its way.

    `run` returns when the step is no longer this worker's, whatever happened.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        database: SyncDatabase,
        storage: Storage,
        settings: Settings,
        wake: WakeListener,
        work_dir: Path,
    ) -> None:
        self._lease = lease
        self._database = database
        self._storage = storage
        self._settings = settings
        self._folder = work_dir / f"{lease.step_id}-{lease.fence}"
        self._child: Child | None = None
        self._child_guard = threading.Lock()
        self._draining = False
        self._progress_at = float("-inf")
        self._phase = ""
        self._since = time.monotonic()
        self._heartbeat = Heartbeat(database, lease, settings, wake, stop_work=self._kill_child)

    def run(self) -> None:
        began, lease = time.monotonic(), self._lease
        outcome, code = "lost", ""
        about = {f"orthokv.{name}": value for name, value in lease.about().items()}
        with tracing.new_trace(f"attempt {lease.step}", linked=lease.traceparent, attributes=about) as span:
            log.info("attempt.started")
            try:
                with self._heartbeat:
                    end = self._work()
                outcome, code = self._conclude(self._heartbeat.reason or end)
            except LeaseLost:
                log.warning("attempt.lease_lost")
            finally:
                self._kill_child()
                shutil.rmtree(self._folder, ignore_errors=True)
                span.set_attribute("orthokv.outcome", outcome)
                if outcome in ("failed", "lost"):
                    tracing.mark_failed(span, code or outcome)
                ATTEMPTS.labels(lease.step, outcome, code).inc()
                ATTEMPT_SECONDS.labels(lease.step).observe(time.monotonic() - began)

    def drain(self) -> None:
        """Planned shutdown.

        Stop after the layer in hand, or after the time allowed. Callable from a signal handler.
        """
        self._draining = True
        self._heartbeat.drain()

    def _work(self) -> Done | Failure:
        try:
            order = self._database.read(load_order, self._lease, self._settings)
            if self._lease.step is StepName.FIT and not order.layers:
                return Done({}, [])  # the worker before us died between its last layer and its report
            with tracing.span("prepare"):
                request = prepare(order, self._lease, self._storage, self._settings, self._folder)
            with tracing.span(f"step {self._lease.step}"):
                return self._run_child(request)
        except (StorageError, OSError) as error:
            return Failure(JobErrorCode.STORAGE_ERROR, str(error), retryable=True)
        except FolderRefused as error:
            return Failure(JobErrorCode.MODEL_NOT_FOUND, str(error), retryable=False)
        except (ProtocolError, IncompleteResult) as error:
            return Failure(JobErrorCode.INTERNAL, f"The runner broke its protocol: {error}", retryable=False)
        finally:
            self._kill_child()

    def _run_child(self, request: Request) -> Done | Failure:
        settings = self._settings
        limits = Limits.of(settings, self._lease.step)
        said = log.bind(**self._lease.about(), **tracing.ids())  # for a thread, which has no context
        self._since = time.monotonic()
        child = Child(
            settings.runner_command,
            request,
            environment=settings.runner_environment,
            limits=limits,
            on_line=lambda line: said.info("child.said", line=line),
        )
        with self._child_guard:
            self._child = child
        if self._heartbeat.reason is not None:  # stopped before there was a child to kill
            child.kill()
        files: list[Produced] = []
        end: Result | Error | None = None
        for message in child.messages():
            if end is not None:
                raise ProtocolError("a message after the last one")
            match message:
                case Progress():
                    self._show(message)
                case File():
                    self._take(message, Path(request.workdir), files)
                case Usage():
                    self._note_usage(message)
                case Result() | Error():
                    end = message
                case _:
                    assert_never(message)
        status = child.wait()
        if status != 0 and self._heartbeat.reason is None:
            log.warning("child.failed", status=status, stderr=child.stderr_tail())
        if status != 0 and child.excess is not None:
            return _excess(child.excess, limits)
        if isinstance(end, Error):
            return _failure(end)
        if status != 0:
            return WORKER_LOST
        if end is None:
            raise ProtocolError("it ended without a result")
        return Done(end.data, files)

    def _take(self, message: File, workdir: Path, files: list[Produced]) -> None:
        """Object first, row second: the upload is whole and verified before anything refers to it."""
        path = Path(message.path)
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(workdir.resolve()):
            raise ProtocolError(f"{message.name} is not a file of the working folder")
        if any(message.name == other.filename for other in files):
            raise ProtocolError(f"{message.name} was made twice")
        lease = self._lease
        key = f"jobs/{lease.job_id}/{lease.step_id}/{lease.fence}/{message.name}"
        failpoints.hit("upload.before")
        stored = self._storage.put_file(key, path)
        failpoints.hit("upload.after")
        produced = Produced(
            filename=message.name,
            object_key=key,
            bytes=stored.bytes,
            sha256=stored.sha256,
            media_type=message.media_type,
            layer=message.layer,
            metrics=message.metrics,
        )
        if message.layer is None:
            files.append(produced)
            return
        if lease.step is not StepName.FIT:
            raise ProtocolError("only a fit step makes layers")
        # Asked before the commit: a stop that comes during it waits for the layer that is being fitted by then.
        draining = self._draining
        self._database.write(commit_layer, lease, produced)
        failpoints.hit("layer.committed")
        self._note_layer(message)
        path.unlink()
        if draining:
            self._heartbeat.stop(Stop.DRAINED)

    def _note_layer(self, message: File) -> None:
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        LAYER_SECONDS.observe(seconds)
        numbers = {name: value for name, value in message.metrics.items() if isinstance(value, int | float)}
        tracing.past_span(
            f"layer {message.layer}",
            began_ns=time.time_ns() - int(seconds * 1e9),
            attributes={f"orthokv.{name}": value for name, value in numbers.items()},
        )
        log.info("layer.committed", layer=message.layer, seconds=round(seconds, 3))

    def _note_usage(self, message: Usage) -> None:
        PEAK_MEMORY_BYTES.labels(self._lease.step, "host").set(message.peak_bytes)
        if message.peak_gpu_bytes is not None:
            PEAK_MEMORY_BYTES.labels(self._lease.step, "gpu").set(message.peak_gpu_bytes)

    def _show(self, message: Progress) -> None:
        """Write progress at most once in a while, but every new phase and every end."""
        moment = time.monotonic()
        if message.phase != self._phase:
            self._since = moment  # the first layer is counted without the loading of the model
        due = moment - self._progress_at >= self._settings.progress_seconds
        if due or message.phase != self._phase or message.done == message.total:
            self._progress_at, self._phase = moment, message.phase
            self._database.write(
                commit_progress,
                self._lease,
                phase=message.phase,
                done=message.done,
                total=message.total,
                unit=message.unit,
            )

    def _conclude(self, outcome: Done | Failure | Stop) -> tuple[str, str]:
        """The last write of this lease; gives how it ended, with a code if it failed."""
        lease = self._lease
        match outcome:
            case Done():
                return self._finish(outcome)
            case Failure():
                return self._fail(outcome)
            case Stop.CANCELLED:
                self._database.write(acknowledge_cancel, lease)
                log.info("attempt.cancelled")
                return "cancelled", ""
            case Stop.DRAINED:
                self._database.write(release, lease)
                log.info("attempt.released")
                return "released", ""
            case Stop.TIME_UP:
                return self._fail(TIME_UP)
            case Stop.LOST:
                raise LeaseLost
            case _:
                assert_never(outcome)

    def _finish(self, done: Done) -> tuple[str, str]:
        failpoints.hit("finish.before")
        try:
            self._database.write(
                finish_step,
                self._lease,
                files=done.files,
                data=done.data,
                layers_per_fit_step=self._settings.layers_per_fit_step,
            )
        except IncompleteResult as error:
            return self._fail(
                Failure(JobErrorCode.INTERNAL, f"The runner broke its protocol: {error}", False)
            )
        failpoints.hit("finish.after")
        log.info("attempt.succeeded")
        return "succeeded", ""

    def _fail(self, failure: Failure) -> tuple[str, str]:
        policy = RetryPolicy(self._settings.max_failures, self._settings.retry_backoff_seconds)
        again = self._database.write(fail, self._lease, failure, policy)
        log.warning("attempt.failed", code=failure.code, message=failure.message, again=again)
        return "failed", failure.code

    def _kill_child(self) -> None:
        with self._child_guard:
            if self._child is not None:
                self._child.kill()


def _excess(excess: Excess, limits: Limits) -> Failure:
    match excess:
        case Excess.MEMORY:
            message = f"The step held more than {limits.memory_bytes} bytes of memory and was ended."
            return Failure(JobErrorCode.OUT_OF_MEMORY, message, retryable=True)
        case Excess.TIME:
            # Again would take as long again; what a fit step has committed is kept for a retry.
            message = f"The step took more than {limits.seconds:g} seconds and was ended."
            return Failure(JobErrorCode.STEP_TIMEOUT, message, retryable=False)
        case _:
            assert_never(excess)


def _failure(error: Error) -> Failure:
    known = error.code in set(JobErrorCode)
    return Failure(
        JobErrorCode(error.code) if known else JobErrorCode.INTERNAL,
        error.message[:MAX_MESSAGE_CHARACTERS],
        retryable=error.retryable,
        layer=error.layer,
        best=error.best,
    )
