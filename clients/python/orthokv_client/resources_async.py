"""The resources of the asynchronous client. Those of the synchronous one are made from this file by `make client`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from orthokv_client import models
from orthokv_client.connection_async import AsyncConnection
from orthokv_client.download import CONNECTIONS, Progress
from orthokv_client.protocol import LONGEST_WAIT_SECONDS, PATIENT, Call, creation, dumped, parsed
from orthokv_client.words import ENDED, DatasetFormat, DeliveryStatus, JobStatus, Order

Paths = list[Path]  # in a class with a method `list` this name cannot be spelled


class AsyncJobs:
    """`client.jobs`"""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def create(
        self, body: models.JobCreate | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> models.Job:
        """Queue a job. Raises pydantic's `ValidationError` for a body that cannot be right."""
        body = models.JobCreate.model_validate(body)
        return parsed(await self._client.send(creation("/v1/jobs", body, idempotency_key)), models.Job)

    async def validate(self, body: models.JobCreate | Mapping[str, Any]) -> models.Validation:
        """Whether a job would be taken, and what it would take: bytes, memory, minutes. Nothing is stored."""
        body = models.JobCreate.model_validate(body)
        return parsed(
            await self._client.send(Call("POST", "/v1/jobs:validate", body=dumped(body))), models.Validation
        )

    async def get(
        self, job_id: str, *, wait_seconds: float | None = None, if_version: int | None = None
    ) -> models.Job:
        """A job as it is now; with `wait_seconds`, up to 60, as it is once its version is another than `if_version`."""
        query = {"wait": wait_seconds, "if_version": if_version}
        return await self._client.get(models.Job, f"/v1/jobs/{job_id}", **query)

    def list(
        self,
        *,
        status: JobStatus | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        order: Order = "desc",
        page_size: int = 100,
    ) -> AsyncIterator[models.Job]:
        """All jobs, newest first, asked for in pages of up to 100."""
        labels = {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        query = {"status": status, "model": model, "order": order, **labels}
        return self._client.items(models.Job, "/v1/jobs", query, page_size)

    async def cancel(self, job_id: str) -> models.Job:
        """Ask for the end of a job. Once this returns the job cannot succeed any more."""
        call = Call("POST", f"/v1/jobs/{job_id}/cancel")
        return parsed(await self._client.send(call), models.Job)

    async def retry(self, job_id: str) -> models.Job:
        """Run a failed or cancelled job again, from what it lacks."""
        # Not harmless: the repetition would find the job queued, and fail.
        call = Call("POST", f"/v1/jobs/{job_id}/retry", harmless=False)
        return parsed(await self._client.send(call), models.Job)

    async def follow(self, job_id: str) -> AsyncIterator[models.Job]:
        """A job now and after each change, until it has ended, by long polls. Outlives a restart of the server."""
        query: dict[str, Any] = {}
        while True:
            call = Call("GET", f"/v1/jobs/{job_id}", query)
            job = parsed(await self._client.send(call, retry=PATIENT), models.Job)
            yield job
            if job.status in ENDED:
                return
            query = {"wait": LONGEST_WAIT_SECONDS, "if_version": job.version}

    async def wait(self, job_id: str, *, timeout_seconds: float | None = None) -> models.Job:
        """A job once it has ended, well or not. Raises `TimeoutError`."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        query: dict[str, Any] = {}
        while True:
            call = Call("GET", f"/v1/jobs/{job_id}", query)
            job = parsed(await self._client.send(call, retry=PATIENT), models.Job)
            if job.status in ENDED:
                return job
            left = LONGEST_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{job_id} is still {job.status}")
            query = {"wait": min(left, LONGEST_WAIT_SECONDS), "if_version": job.version}

    def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[models.Event]:
        """Every event of a job after number `after`, as it comes, none twice and none left out, until the job is over."""
        return self._client.stream(job_id, after)

    async def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> models.EventPage:
        """A page of a job's events, now."""
        return await self._client.get(models.EventPage, f"/v1/jobs/{job_id}/events", after=after, limit=limit)

    async def layers(self, job_id: str) -> models.LayerList:
        """Layers that are fitted and safe."""
        return await self._client.get(models.LayerList, f"/v1/jobs/{job_id}/layers")

    async def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with all that it made."""
        await self._client.send(Call("DELETE", f"/v1/jobs/{job_id}"))


class AsyncDatasets:
    """`client.datasets`"""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def upload(
        self, path: Path | str, *, filename: str | None = None, format: DatasetFormat | None = None
    ) -> models.Dataset:
        """Announce a file, send it and confirm it by its digest: a dataset that jobs can name. Raises `OSError`."""
        path = Path(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        announced = {"filename": filename or path.name, **({} if format is None else {"format": format})}
        body = models.DatasetCreate.model_validate(announced)
        made = parsed(await self._client.send(creation("/v1/datasets", body, None)), models.Dataset)
        await self._client.put(f"/v1/datasets/{made.id}/content", path)
        complete = models.DatasetComplete(sha256=digest.hexdigest())
        call = Call("POST", f"/v1/datasets/{made.id}/complete", body=dumped(complete))
        return parsed(await self._client.send(call), models.Dataset)

    async def get(self, dataset_id: str) -> models.Dataset:
        return await self._client.get(models.Dataset, f"/v1/datasets/{dataset_id}")

    def list(self, *, order: Order = "desc") -> AsyncIterator[models.Dataset]:
        """All datasets, newest first."""
        return self._client.items(models.Dataset, "/v1/datasets", {"order": order})

    async def delete(self, dataset_id: str) -> None:
        """Delete a dataset that no open job needs."""
        await self._client.send(Call("DELETE", f"/v1/datasets/{dataset_id}"))


class AsyncProfiles:
    """`client.profiles`"""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def get(self, profile_id: str) -> models.Profile:
        return await self._client.get(models.Profile, f"/v1/profiles/{profile_id}")

    def list(self, *, order: Order = "desc") -> AsyncIterator[models.Profile]:
        """All profiles, newest first."""
        return self._client.items(models.Profile, "/v1/profiles", {"order": order})

    async def delete(self, profile_id: str) -> None:
        """Delete a profile that no open job needs."""
        await self._client.send(Call("DELETE", f"/v1/profiles/{profile_id}"))

    async def create_checkpoint(
        self,
        profile_id: str,
        body: models.CheckpointCreate | Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
    ) -> models.Job:
        """Queue a job that makes a checkpoint for another budget, without fitting again."""
        body = models.CheckpointCreate.model_validate(body)
        call = creation(f"/v1/profiles/{profile_id}/checkpoints", body, idempotency_key)
        return parsed(await self._client.send(call), models.Job)

    async def download(
        self,
        profile_id: str,
        folder: Path | str,
        *,
        connections: int = CONNECTIONS,
        progress: Progress | None = None,
    ) -> Paths:
        """The profile's files into a folder; see `artifacts.download`."""
        files = (await self.get(profile_id)).files
        artifacts = [files.json_, files.tensors, files.plot]
        return await self._client.download(artifacts, folder, connections=connections, progress=progress)


class AsyncCheckpoints:
    """`client.checkpoints`"""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def get(self, checkpoint_id: str) -> models.Checkpoint:
        return await self._client.get(models.Checkpoint, f"/v1/checkpoints/{checkpoint_id}")

    def list(
        self, *, profile_id: str | None = None, order: Order = "desc"
    ) -> AsyncIterator[models.Checkpoint]:
        """All checkpoints, newest first."""
        query = {"profile_id": profile_id, "order": order}
        return self._client.items(models.Checkpoint, "/v1/checkpoints", query)

    async def delete(self, checkpoint_id: str) -> None:
        await self._client.send(Call("DELETE", f"/v1/checkpoints/{checkpoint_id}"))

    async def files(self, checkpoint_id: str) -> models.Manifest:
        """The files to download, each with its size and digest."""
        return await self._client.get(models.Manifest, f"/v1/checkpoints/{checkpoint_id}/files")

    async def download(
        self,
        checkpoint_id: str,
        folder: Path | str,
        *,
        connections: int = CONNECTIONS,
        progress: Progress | None = None,
    ) -> Paths:
        """A checkpoint that loads, into a folder; see `artifacts.download`."""
        artifacts = (await self.files(checkpoint_id)).data
        return await self._client.download(artifacts, folder, connections=connections, progress=progress)


class AsyncArtifacts:
    """`client.artifacts`"""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def get(self, artifact_id: str) -> models.Artifact:
        return await self._client.get(models.Artifact, f"/v1/artifacts/{artifact_id}")

    async def delete(self, artifact_id: str) -> None:
        """Delete a file that belongs to no profile and no checkpoint."""
        await self._client.send(Call("DELETE", f"/v1/artifacts/{artifact_id}"))

    async def download(
        self,
        artifact: models.Artifact | str,
        folder: Path | str,
        *,
        connections: int = CONNECTIONS,
        progress: Progress | None = None,
    ) -> Path:
        """One file into a folder, under its own name; its path.

        Several ranges come at once, over at most `connections`. What a killed or broken download has left in the folder is
        gone on with. The file has its name only when it is complete and its SHA-256 is right. Raises `DigestMismatch`,
        `NotEnoughSpace`, `DownloadInUse` and `OSError`, besides what every call raises.
        """
        found = await self.get(artifact) if isinstance(artifact, str) else artifact
        paths = await self._client.download([found], folder, connections=connections, progress=progress)
        return paths[0]


class AsyncApiKeys:
    """`client.api_keys`: needs the scope `keys:manage`."""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def create(self, body: models.ApiKeyCreate | Mapping[str, Any]) -> models.ApiKeyCreated:
        """Make a key, which is in this answer and nowhere else."""
        body = models.ApiKeyCreate.model_validate(body)
        # Not harmless: a repetition would make another key.
        call = Call("POST", "/v1/api_keys", body=dumped(body), harmless=False)
        return parsed(await self._client.send(call), models.ApiKeyCreated)

    async def get(self, key_id: str) -> models.ApiKey:
        return await self._client.get(models.ApiKey, f"/v1/api_keys/{key_id}")

    def list(self, *, order: Order = "desc") -> AsyncIterator[models.ApiKey]:
        """All keys of the project, newest first; for an admin, of all projects."""
        return self._client.items(models.ApiKey, "/v1/api_keys", {"order": order})

    async def revoke(self, key_id: str) -> models.ApiKey:
        """End a key, from the next request on."""
        return parsed(await self._client.send(Call("DELETE", f"/v1/api_keys/{key_id}")), models.ApiKey)


class AsyncProjects:
    """`client.projects`: needs the scope `admin`."""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def create(
        self, body: models.ProjectCreate | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> models.Project:
        body = models.ProjectCreate.model_validate(body)
        return parsed(
            await self._client.send(creation("/v1/projects", body, idempotency_key)), models.Project
        )

    async def get(self, project_id: str) -> models.Project:
        return await self._client.get(models.Project, f"/v1/projects/{project_id}")

    def list(self, *, order: Order = "desc") -> AsyncIterator[models.Project]:
        """All projects, newest first."""
        return self._client.items(models.Project, "/v1/projects", {"order": order})

    async def update(self, project_id: str, body: models.ProjectUpdate | Mapping[str, Any]) -> models.Project:
        """Set all limits of a project."""
        body = models.ProjectUpdate.model_validate(body)
        call = Call("PATCH", f"/v1/projects/{project_id}", body=dumped(body))
        return parsed(await self._client.send(call), models.Project)


class AsyncWebhookEndpoints:
    """`client.webhook_endpoints`: needs the scope `webhooks:manage`."""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    async def create(
        self, body: models.WebhookEndpointCreate | Mapping[str, Any]
    ) -> models.WebhookEndpointCreated:
        """Make an endpoint, whose secret is in this answer and nowhere else."""
        body = models.WebhookEndpointCreate.model_validate(body)
        # Not harmless: a repetition would make another endpoint.
        call = Call("POST", "/v1/webhook_endpoints", body=dumped(body), harmless=False)
        return parsed(await self._client.send(call), models.WebhookEndpointCreated)

    async def get(self, endpoint_id: str) -> models.WebhookEndpoint:
        return await self._client.get(models.WebhookEndpoint, f"/v1/webhook_endpoints/{endpoint_id}")

    def list(self, *, order: Order = "desc") -> AsyncIterator[models.WebhookEndpoint]:
        """All endpoints, newest first."""
        return self._client.items(models.WebhookEndpoint, "/v1/webhook_endpoints", {"order": order})

    async def update(
        self, endpoint_id: str, body: models.WebhookEndpointUpdate | Mapping[str, Any]
    ) -> models.WebhookEndpoint:
        """Change what the body names."""
        body = models.WebhookEndpointUpdate.model_validate(body)
        changed = body.model_dump(mode="json", exclude_unset=True)
        call = Call("PATCH", f"/v1/webhook_endpoints/{endpoint_id}", body=changed)
        return parsed(await self._client.send(call), models.WebhookEndpoint)

    async def rotate_secret(
        self, endpoint_id: str, body: models.WebhookSecretRotate | Mapping[str, Any] | None = None
    ) -> models.WebhookEndpointCreated:
        """A new secret, in this answer only; the old one signs beside it for a while."""
        body = models.WebhookSecretRotate.model_validate(body or {})
        path = f"/v1/webhook_endpoints/{endpoint_id}/rotate_secret"
        # Not harmless: a repetition would end the secret that was lost on the way.
        call = Call("POST", path, body=dumped(body), harmless=False)
        return parsed(await self._client.send(call), models.WebhookEndpointCreated)

    async def delete(self, endpoint_id: str) -> None:
        """Delete an endpoint with its deliveries."""
        await self._client.send(Call("DELETE", f"/v1/webhook_endpoints/{endpoint_id}"))

    def deliveries(
        self, endpoint_id: str, *, status: DeliveryStatus | None = None, order: Order = "desc"
    ) -> AsyncIterator[models.WebhookDelivery]:
        """What was sent to an endpoint, or is to be, newest first."""
        path = f"/v1/webhook_endpoints/{endpoint_id}/deliveries"
        return self._client.items(models.WebhookDelivery, path, {"status": status, "order": order})

    async def redeliver(self, endpoint_id: str, delivery_id: str) -> models.WebhookDelivery:
        """Send a message again, under the same id."""
        path = f"/v1/webhook_endpoints/{endpoint_id}/deliveries/{delivery_id}/redeliver"
        call = Call("POST", path, harmless=False)
        return parsed(await self._client.send(call), models.WebhookDelivery)


class AsyncAuditEvents:
    """`client.audit_events`: needs the scope `admin`."""

    def __init__(self, client: AsyncConnection) -> None:
        self._client = client

    def list(
        self, *, project_id: str | None = None, action: str | None = None, order: Order = "desc"
    ) -> AsyncIterator[models.AuditEvent]:
        """Who did what, newest first."""
        query = {"project_id": project_id, "action": action, "order": order}
        return self._client.items(models.AuditEvent, "/v1/audit_events", query)
