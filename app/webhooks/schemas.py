"""Bodies of webhook endpoints and deliveries, and of the messages themselves."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from app.schemas import Body, Resource


class WebhookEventType(StrEnum):
    """What an endpoint can be told."""

    JOB_CREATED = "job.created"
    JOB_STARTED = "job.started"
    JOB_CANCELLING = "job.cancelling"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    JOB_RETRIED = "job.retried"


WEBHOOK_EVENT_TYPES = frozenset(WebhookEventType)

WebhookUrl = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2048,
        examples=["https://hooks.example.com/orthokv"],
        description="https, port 443, a public host.",
    ),
]
Description = Annotated[str, Field(max_length=255)]
EventTypes = Annotated[
    list[WebhookEventType] | None,
    Field(min_length=1, max_length=len(WebhookEventType), description="`null`: all types."),
]
CloudEvents = Annotated[
    bool, Field(description="Send the headers of a CloudEvent (`ce-id`, `ce-type`, ...), too.")
]


class WebhookEndpointCreate(Body):
    """An address to be told about jobs."""

    url: WebhookUrl
    description: Description = ""
    event_types: EventTypes = None
    cloud_events: CloudEvents = False


class WebhookEndpointUpdate(Body):
    """What is to change; fields that are left out stay as they are."""

    url: WebhookUrl | None = None
    description: Description | None = None
    event_types: EventTypes = None
    cloud_events: CloudEvents | None = None
    enabled: bool | None = None


class WebhookSecretRotate(Body):
    """How long the present secret goes on signing beside the new one."""

    overlap_hours: Annotated[float, Field(ge=0, le=168)] = 24.0


class WebhookEndpoint(Resource):
    """An address of the project's, without its secret."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    id: str
    url: str
    description: str
    event_types: list[WebhookEventType] | None
    cloud_events: bool
    enabled: bool
    disabled_reason: Literal["client", "gone", "failing"] | None = Field(
        description="`client`: by request. `gone`: it answered 410. `failing`: every retry of a delivery failed."
    )
    disabled_at: datetime | None
    previous_secret_expires_at: datetime | None = Field(description="Until then two secrets sign.")
    created_at: datetime


class WebhookEndpointCreated(WebhookEndpoint):
    """An endpoint with its new secret, which is shown this once."""

    secret: str = Field(examples=["whsec_..."])


class WebhookDelivery(Resource):
    """One message to one endpoint, with the outcome of its last attempt."""

    object: Literal["webhook_delivery"] = "webhook_delivery"
    id: str = Field(description="The `webhook-id` of every attempt.")
    endpoint_id: str
    type: WebhookEventType
    job_id: str
    status: Literal["pending", "succeeded", "failed"]
    attempts: int
    next_attempt_at: datetime | None
    last_attempt_at: datetime | None
    response_status: int | None
    response_body: str | None = Field(description="Its first 2048 bytes.")
    error: str | None
    created_at: datetime
    finished_at: datetime | None


class WebhookJob(Resource):
    """The job that a message is about, as it was then. Ask for the rest with its id."""

    job_id: str
    kind: str
    status: str
    attempt: int
    event_seq: int = Field(description="Orders the messages about one job: they may arrive in any order.")
    profile_id: str | None
    checkpoint_id: str | None
    error_code: str | None


class WebhookMessage(Resource):
    """The body of a webhook request."""

    type: WebhookEventType
    timestamp: datetime
    data: WebhookJob
