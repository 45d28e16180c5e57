"""Brings MLflow up to date with the service, as often as it is asked: each ended job has exactly one run.

MLflow itself remembers what is there (a tag with the job's id and version), so the exporter may be killed at any
moment, started again anywhere, and run twice by mistake. Nothing of the service waits for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from app.mlflow_export.record import (
    CHECKPOINT_ID,
    FINISHED_AT,
    JOB_ID,
    MANIFEST,
    VERSION,
    Job,
    Record,
    model_name,
    record_of,
)
from orthokv_client import OrthoKV
from orthokv_client.protocol import Call
from orthokv_client.words import ENDED

log = structlog.get_logger()

METRICS_PER_REQUEST = 1000  # MLflow's limits
ENTRIES_PER_REQUEST = 100
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


class TrackingAway(Exception):
    """MLflow does not answer, or not to this client."""


@dataclass(frozen=True)
class Options:
    """`public_url` is the service's address in what MLflow shows; `days`: older jobs, by creation, are left alone."""

    public_url: str
    experiment: str = "orthokv"
    register: bool = True
    model_name: str | None = None
    alias: str | None = None
    days: float = 30.0


@dataclass
class Swept:
    """How many jobs a sweep wrote, and how many it could not."""

    exported: int = 0
    failed: int = 0


class Exporter:
    """One project of one service, to one experiment of one MLflow server."""

    def __init__(self, service: OrthoKV, tracking_uri: str, options: Options) -> None:
        self._service, self._options = service, options
        self._mlflow = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        self._known: dict[str, int] = {}

    def sweep(self) -> Swept:
        """Write every ended job that MLflow does not show as it is now, oldest first.

        Raises `TrackingAway`, and what the client raises of the listing.
        """
        swept = Swept()
        experiment = self._experiment()
        jobs = [(job_id, version) for job_id, version in self._ended() if self._known.get(job_id) != version]
        # Oldest first: the newest checkpoint of a model becomes its newest version.
        for job_id, version in reversed(jobs):
            try:
                swept.exported += self._export(job_id, version, experiment)
            except MlflowException as error:
                swept.failed += 1
                log.warning("mlflow.failed", job_id=job_id, error=said(error))
                self._experiment()  # one job that is refused does not hold up others; a server that is away does
            else:
                self._known[job_id] = version
        return swept

    def _get(self, path: str) -> dict[str, Any]:
        """Bodies as they are: what MLflow is told is text, and fields that this version does not know belong to it."""
        body: dict[str, Any] = self._service.send(Call("GET", path)).json()
        return body

    def _ended(self) -> Iterator[tuple[str, int]]:
        """Ids and versions of ended jobs, newest first."""
        oldest = datetime.now(UTC) - timedelta(days=self._options.days)
        for job in self._service.jobs.list():
            if job.created_at < oldest:
                return
            if job.status in ENDED:
                yield job.id, job.version

    def _export(self, job_id: str, version: int, experiment: str) -> bool:
        """Whether anything had to be written."""
        run = self._run_of(job_id, experiment)
        if run is not None and (
            run.data.tags.get(VERSION) == str(version) or run.info.lifecycle_stage == "deleted"
        ):
            return False  # written already, or deleted by somebody who wants it so
        job = self._get(f"/v1/jobs/{job_id}")
        if job["status"] not in ENDED:  # retried since it was listed
            return False
        manifest = self._manifest(job)
        layers = self._get(f"/v1/jobs/{job_id}/layers")["data"]
        record = record_of(job, layers, manifest=manifest, public_url=self._options.public_url)
        if run is None:
            self._mlflow.create_run(
                experiment, start_time=record.start_time, run_name=record.name, tags={JOB_ID: job_id}
            )
            # Asked again: another exporter may have made one at the same time.
            run = self._run_of(job_id, experiment)
            assert run is not None
        run_id: str = run.info.run_id
        self._write(run_id, record)
        if self._options.register and job["status"] == "succeeded":
            self._register(job, run_id, record)
        self._mlflow.set_tag(run_id, VERSION, str(job["version"]))
        log.info("mlflow.exported", job_id=job_id, run_id=run_id, status=record.status)
        return True

    def _run_of(self, job_id: str, experiment: str) -> Any:
        """The run of a job. Of several, the complete one or the first by id stays, the others are deleted."""
        found = self._mlflow.search_runs(
            [experiment], f"tags.`{JOB_ID}` = '{job_id}'", run_view_type=ViewType.ALL
        )
        active = [run for run in found if run.info.lifecycle_stage == "active"]
        active.sort(key=lambda run: (VERSION not in run.data.tags, run.info.run_id))
        for surplus in active[1:]:
            self._mlflow.delete_run(surplus.info.run_id)
        return active[0] if active else next(iter(found), None)

    def _write(self, run_id: str, record: Record) -> None:
        metrics = [Metric(m.key, m.value, m.timestamp, m.step) for m in record.metrics]
        params = [Param(key, value) for key, value in record.params.items()]
        tags = [RunTag(key, value) for key, value in record.tags.items()]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self._mlflow.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])
        for start in range(0, max(len(params), len(tags)), ENTRIES_PER_REQUEST):
            part = slice(start, start + ENTRIES_PER_REQUEST)
            self._mlflow.log_batch(run_id, params=params[part], tags=tags[part])
        self._mlflow.set_terminated(run_id, status=record.status, end_time=record.end_time)

    def _register(self, job: Job, run_id: str, record: Record) -> None:
        """The checkpoint as a model version that points to it: its bytes stay where they are."""
        checkpoint_id = record.tags[CHECKPOINT_ID]
        name = self._options.model_name or model_name(job)
        self._ensure(self._mlflow.create_registered_model, name)
        versions = self._versions(name, checkpoint_id)
        if not versions:
            place = f"{self._options.public_url}/v1/checkpoints/{checkpoint_id}"
            told = {key: record.tags[key] for key in (CHECKPOINT_ID, JOB_ID, FINISHED_AT, MANIFEST)}
            # A name and not an address: MLflow refuses sources that its server could be made to fetch.
            self._mlflow.create_model_version(
                name,
                source=f"orthokv://{place.partition('://')[2]}",
                run_id=run_id,
                tags={**told, "orthokv.url": place},
                await_creation_for=0,  # there is nothing to be copied
            )
            versions = self._versions(name, checkpoint_id)
        for surplus in versions[1:]:
            self._mlflow.delete_model_version(name, str(surplus.version))
        if self._options.alias is not None and self._is_newest(name, record):
            self._mlflow.set_registered_model_alias(name, self._options.alias, str(versions[0].version))

    def _versions(self, name: str, checkpoint_id: str) -> list[Any]:
        found = self._mlflow.search_model_versions(
            f"name = '{name}' and tags.`{CHECKPOINT_ID}` = '{checkpoint_id}'"
        )
        return sorted(found, key=lambda version: int(version.version))

    def _is_newest(self, name: str, record: Record) -> bool:
        """Whether the alias names nothing that finished later: jobs may be exported out of order."""
        aliases = self._mlflow.get_registered_model(name).aliases
        current = aliases.get(self._options.alias)
        if current is None:
            return True
        tags = self._mlflow.get_model_version(name, current).tags
        return int(tags.get(FINISHED_AT, 0)) <= record.end_time

    def _manifest(self, job: Job) -> str | None:
        checkpoint_id = (job["result"] or {}).get("checkpoint_id")
        if checkpoint_id is None:
            return None
        files = self._get(f"/v1/checkpoints/{checkpoint_id}/files")["data"]
        return next(str(file["sha256"]) for file in files if file["filename"] == "SHA256SUMS")

    def _experiment(self) -> str:
        try:
            found = self._mlflow.get_experiment_by_name(self._options.experiment)
            if found is None:
                self._ensure(self._mlflow.create_experiment, self._options.experiment)
                found = self._mlflow.get_experiment_by_name(self._options.experiment)
            experiment_id: str = found.experiment_id
        except MlflowException as error:
            raise TrackingAway(said(error)) from error
        return experiment_id

    @staticmethod
    def _ensure(create: Any, name: str) -> None:
        try:
            create(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def said(error: MlflowException) -> str:
    """One line of an error, without the user and password that a tracking URI may hold."""
    first = str(error).partition("\n")[0]
    return _CREDENTIALS.sub("//***@", f"{error.error_code}: {first}")[:500]
