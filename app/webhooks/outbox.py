"""Deliveries are written here, in the transaction that changes the job: both are there, or neither."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.infra.database import clock
from app.infra.ids import new_id
from app.jobs.models import Job
from app.webhooks import repository
from app.webhooks.models import WebhookDelivery
from app.webhooks.schemas import WEBHOOK_EVENT_TYPES, WebhookEventType, WebhookJob, WebhookMessage


def enqueue(session: Session, job: Job, event: str) -> None:
    """A delivery for every endpoint of the job's project that wants this event. The caller holds the job's lock."""
    if event not in WEBHOOK_EVENT_TYPES:
        return
    endpoints = [
        endpoint
        for endpoint in repository.endpoints_to_tell(session, job.project_id)
        if endpoint.event_types is None or event in endpoint.event_types
    ]
    if not endpoints:
        return
    result, error = job.result or {}, job.error or {}
    message = WebhookMessage(
        type=WebhookEventType(event),
        timestamp=clock(session),
        data=WebhookJob(
            job_id=job.id,
            kind=job.kind,
            status=job.status,
            attempt=job.attempt,
            event_seq=job.event_seq,
            profile_id=result.get("profile_id"),
            checkpoint_id=result.get("checkpoint_id"),
            error_code=error.get("code"),
        ),
    )
    body = message.model_dump_json()
    for endpoint in endpoints:
        delivery = WebhookDelivery(
            id=new_id("msg"), endpoint_id=endpoint.id, type=event, job_id=job.id, body=body
        )
        session.add(delivery)
