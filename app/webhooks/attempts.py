"""One attempt of a delivery: claimed, sent, recorded.

The claim and the record are transactions, and the request lies between them. A sender that dies there leaves a lease
that runs out; the next one sends again under the same `webhook-id`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import structlog
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app.audit.service import record as audit
from app.infra.counted import WEBHOOK_ATTEMPTS
from app.infra.database import after_commit, clock, now
from app.infra.outbound import Outbound, Unreachable, UrlRefused
from app.infra.sealing import CannotOpen, Sealer
from app.principal import Principal
from app.webhooks import repository
from app.webhooks.service import DISABLED, disable

GONE = 410
MAX_RETRY_AFTER_SECONDS = 86_400.0
JITTER = 0.1
USER_AGENT = "OrthoKV-Webhooks/1"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Attempt:
    """A claimed delivery. `secrets` are still sealed; the first is the present one."""

    delivery_id: str
    endpoint_id: str
    project_id: str
    number: int
    url: str
    type: str
    job_id: str
    body: str
    created_at: datetime
    cloud_events: bool
    secrets: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. `error` is None for a 2xx."""

    error: str | None
    status: int | None = None
    body: str | None = None
    retry_after_seconds: float = 0.0


def claim(session: Session, *, lease_seconds: float) -> Attempt | None:
    """Take the next delivery that is due, under a lease."""
    found = repository.claim_due(session, lease_seconds=lease_seconds)
    if found is None:
        return None
    delivery, endpoint = found
    secrets = [endpoint.secret]
    expires = endpoint.previous_secret_expires_at
    if endpoint.previous_secret is not None and expires is not None and expires > clock(session):
        secrets.append(endpoint.previous_secret)
    return Attempt(
        delivery_id=delivery.id,
        endpoint_id=endpoint.id,
        project_id=endpoint.project_id,
        number=delivery.attempts,
        url=endpoint.url,
        type=delivery.type,
        job_id=delivery.job_id,
        body=delivery.body,
        created_at=delivery.created_at,
        cloud_events=endpoint.cloud_events,
        secrets=tuple(secrets),
    )


def send(attempt: Attempt, *, sealer: Sealer, outbound: Outbound) -> Outcome:
    """Sign the body and post it."""
    try:
        headers = headers_of(attempt, [sealer.open(sealed) for sealed in attempt.secrets], datetime.now(UTC))
        answer = outbound.post(attempt.url, content=attempt.body.encode(), headers=headers)
    except CannotOpen as error:
        log.error("webhooks.secret_sealed_otherwise", endpoint=attempt.endpoint_id, reason=str(error))
        return Outcome("The server cannot read the endpoint's secret.")
    except (UrlRefused, Unreachable) as error:
        return Outcome(f"Not delivered: {error}.")
    body = answer.body.decode("utf-8", errors="replace").replace("\0", "�")
    if 200 <= answer.status < 300:
        return Outcome(None, answer.status, body)
    delay = retry_after(answer.headers.get("retry-after", ""), datetime.now(UTC))
    return Outcome(f"The endpoint answered {answer.status}.", answer.status, body, delay)


def headers_of(attempt: Attempt, secrets: Sequence[str], moment: datetime) -> Mapping[str, str]:
    """Headers of one attempt: a signature by each secret, and those of a CloudEvent where the endpoint wants them."""
    signatures = [Webhook(secret).sign(attempt.delivery_id, moment, attempt.body) for secret in secrets]
    headers = {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "webhook-id": attempt.delivery_id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
    if attempt.cloud_events:
        headers |= {
            "ce-specversion": "1.0",
            "ce-id": attempt.delivery_id,
            "ce-type": f"orthokv.{attempt.type}",
            "ce-source": f"/v1/projects/{attempt.project_id}",
            "ce-subject": attempt.job_id,
            "ce-time": attempt.created_at.isoformat().replace("+00:00", "Z"),
        }
    return headers


def retry_after(header: str, moment: datetime) -> float:
    """Seconds that a `Retry-After` asks for, at most a day; 0 for none that can be read."""
    try:
        seconds = (
            float(header) if header.isdecimal() else (parsedate_to_datetime(header) - moment).total_seconds()
        )
    except (ValueError, TypeError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def record(session: Session, attempt: Attempt, outcome: Outcome, *, schedule: Sequence[float]) -> None:
    """Write what came of an attempt: done, another try later, or the end of the endpoint.

    Nothing is written when another sender has taken the delivery over, or the endpoint is gone.
    """
    endpoint = repository.lock_endpoint(session, attempt.endpoint_id)
    delivery = repository.lock_delivery(
        session, attempt.delivery_id, endpoint_id=attempt.endpoint_id, attempt=attempt.number
    )
    if endpoint is None or delivery is None:
        return
    delivery.lease_expires_at = None
    delivery.response_status, delivery.response_body = outcome.status, outcome.body
    delivery.error = outcome.error
    taken = outcome.error is None
    after_commit(session, WEBHOOK_ATTEMPTS.labels("succeeded" if taken else "failed").inc)
    if taken:
        delivery.status, delivery.finished_at = "succeeded", clock(session)
        return
    about = {"endpoint": endpoint.id, "delivery": delivery.id, "attempt": attempt.number}
    log.info("webhook.not_delivered", **about, status=outcome.status)
    delivery.failures += 1
    last = delivery.failures > len(schedule)
    if endpoint.enabled and outcome.status != GONE and not last:
        delay = schedule[delivery.failures - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        delivery.next_attempt_at = now(max(delay, outcome.retry_after_seconds))
        return
    if not endpoint.enabled:
        delivery.error = f"{outcome.error} {DISABLED}"
    delivery.status, delivery.finished_at = "failed", clock(session)
    session.flush()
    if endpoint.enabled and (outcome.status == GONE or not repository.succeeded_since(session, delivery)):
        reason = "gone" if outcome.status == GONE else "failing"
        disable(session, endpoint, reason)
        system = Principal(endpoint.project_id, "system", frozenset())
        audit(session, system, "webhook_endpoint.disabled", endpoint.id, data={"reason": reason})
        log.warning("webhook.endpoint_disabled", **about, reason=reason)
