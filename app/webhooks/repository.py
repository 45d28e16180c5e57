"""Statements over webhook endpoints and deliveries.

Locks are taken job first, then endpoint, then delivery; a claim locks deliveries alone and waits for none.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.http.pagination import Cursor, cut
from app.infra.database import clock, now
from app.webhooks.models import WebhookDelivery, WebhookEndpoint

_BATCH = 1000


def endpoints_to_tell(session: Session, project_id: str) -> list[WebhookEndpoint]:
    """Enabled endpoints, kept from being deleted until the transaction ends, by a lock that hinders nothing else."""
    statement = (
        select(WebhookEndpoint)
        .where(WebhookEndpoint.project_id == project_id, WebhookEndpoint.enabled)
        .order_by(WebhookEndpoint.id)
        .with_for_update(read=True, key_share=True)
    )
    return list(session.execute(statement).scalars())


def count_endpoints(session: Session, project_id: str) -> int:
    statement = select(func.count(WebhookEndpoint.id)).where(WebhookEndpoint.project_id == project_id)
    return session.execute(statement).scalar_one()


def find_endpoint(session: Session, endpoint_id: str, *, project_id: str) -> WebhookEndpoint | None:
    statement = select(WebhookEndpoint).where(
        WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id
    )
    return session.execute(statement).scalar_one_or_none()


def find_locked_endpoint(
    session: Session, endpoint_id: str, *, project_id: str, to_delete: bool = False
) -> WebhookEndpoint | None:
    statement = (
        select(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id)
        .with_for_update(key_share=not to_delete)
    )
    return session.execute(statement).scalar_one_or_none()


def lock_endpoint(session: Session, endpoint_id: str) -> WebhookEndpoint | None:
    """An endpoint of any project: for the sender."""
    statement = (
        select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).with_for_update(key_share=True)
    )
    return session.execute(statement).scalar_one_or_none()


def list_endpoints(
    session: Session, cursor: Cursor, *, project_id: str
) -> tuple[list[WebhookEndpoint], bool]:
    within = WebhookEndpoint.project_id == project_id
    return cut(session, select(WebhookEndpoint), WebhookEndpoint.id, cursor, within=within)


def delete_endpoint(session: Session, endpoint: WebhookEndpoint) -> None:
    """The endpoint, its secrets and all its deliveries."""
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id))
    session.delete(endpoint)


def list_deliveries(
    session: Session, cursor: Cursor, *, endpoint_id: str, status: str | None
) -> tuple[list[WebhookDelivery], bool]:
    statement = select(WebhookDelivery)
    if status is not None:
        statement = statement.where(WebhookDelivery.status == status)
    within = WebhookDelivery.endpoint_id == endpoint_id
    return cut(session, statement, WebhookDelivery.id, cursor, within=within)


def lock_delivery(
    session: Session, delivery_id: str, *, endpoint_id: str, attempt: int | None = None
) -> WebhookDelivery | None:
    """A delivery; with `attempt`, only while that is its last one."""
    statement = select(WebhookDelivery).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id
    )
    if attempt is not None:
        statement = statement.where(WebhookDelivery.attempts == attempt)
    options = {"populate_existing": True}
    return session.execute(statement.with_for_update(), execution_options=options).scalar_one_or_none()


def is_being_sent(session: Session, delivery_id: str) -> bool:
    statement = select(WebhookDelivery.id).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.lease_expires_at > now()
    )
    return session.execute(statement).one_or_none() is not None


def claim_due(session: Session, *, lease_seconds: float) -> tuple[WebhookDelivery, WebhookEndpoint] | None:
    """Take the delivery that has been due for longest, of an endpoint that nobody is sending to just now.

    One at a time for each endpoint, so that a slow one holds one sender and not all of them.
    """
    other = aliased(WebhookDelivery)
    busy = exists().where(
        other.endpoint_id == WebhookDelivery.endpoint_id,
        other.status == "pending",
        other.lease_expires_at > now(),
    )
    statement = (
        select(WebhookDelivery, WebhookEndpoint)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(_waits_for_a_sender(), WebhookEndpoint.enabled, ~busy)
        .order_by(WebhookDelivery.next_attempt_at, WebhookDelivery.id)
        .limit(1)
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    found = session.execute(statement).one_or_none()
    if found is None:
        return None
    delivery, endpoint = found
    delivery.attempts += 1
    delivery.lease_expires_at = now(lease_seconds)
    delivery.last_attempt_at = now()
    session.flush()
    return delivery, endpoint


def anything_due(session: Session) -> bool:
    """Whether a claim is worth its write lock (on SQLite there is one for the whole database)."""
    statement = (
        select(WebhookDelivery.id)
        .where(WebhookDelivery.status == "pending", WebhookDelivery.next_attempt_at <= now())
        .limit(1)
    )
    return session.execute(statement).one_or_none() is not None


def count_due(session: Session) -> tuple[int, float]:
    """Deliveries that could be sent now and that nobody sends: how many, and for how many seconds the oldest has waited."""
    oldest_first = func.min(WebhookDelivery.next_attempt_at)
    statement = select(func.count(), oldest_first).where(_waits_for_a_sender())
    count, oldest = session.execute(statement).one()
    return count, 0.0 if oldest is None else max(0.0, (clock(session) - oldest).total_seconds())


def _waits_for_a_sender() -> ColumnElement[bool]:
    """Due, and under nobody's lease."""
    return and_(
        WebhookDelivery.status == "pending",
        WebhookDelivery.next_attempt_at <= now(),
        or_(WebhookDelivery.lease_expires_at.is_(None), WebhookDelivery.lease_expires_at <= now()),
    )


def succeeded_since(session: Session, delivery: WebhookDelivery) -> bool:
    """Whether the endpoint has taken another delivery since this one was made."""
    statement = (
        select(WebhookDelivery.id)
        .where(
            WebhookDelivery.endpoint_id == delivery.endpoint_id,
            WebhookDelivery.status == "succeeded",
            WebhookDelivery.finished_at > delivery.created_at,
        )
        .limit(1)
    )
    return session.execute(statement).one_or_none() is not None


def end_pending(session: Session, endpoint_id: str, *, error: str) -> None:
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.status == "pending")
        .values(status="failed", error=error, finished_at=now())
        .execution_options(synchronize_session="fetch")
    )


def end_pending_of_disabled(session: Session) -> int:
    """End what a job told an endpoint in the very moment in which it was disabled."""
    disabled = select(WebhookEndpoint.id).where(~WebhookEndpoint.enabled)
    statement = (
        update(WebhookDelivery)
        .where(
            WebhookDelivery.status == "pending", WebhookDelivery.endpoint_id.in_(disabled.scalar_subquery())
        )
        .values(status="failed", finished_at=now())
        .returning(WebhookDelivery.id)
    )
    return len(session.execute(statement).scalars().all())


def forget_old_deliveries(session: Session, *, older_than_seconds: float) -> int:
    old = (
        select(WebhookDelivery.id).where(WebhookDelivery.finished_at < now(-older_than_seconds)).limit(_BATCH)
    )
    statement = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old.scalar_subquery()))
    return len(session.execute(statement.returning(WebhookDelivery.id)).scalars().all())


def forget_old_secrets(session: Session) -> int:
    statement = (
        update(WebhookEndpoint)
        .where(WebhookEndpoint.previous_secret_expires_at <= now())
        .values(previous_secret=None, previous_secret_expires_at=None)
        .returning(WebhookEndpoint.id)
    )
    return len(session.execute(statement).scalars().all())


def lock_endpoints_sealed_otherwise(session: Session, *, key_id: str) -> list[WebhookEndpoint]:
    """Endpoints that have a secret which another key than this one has sealed."""
    current = f"{key_id}:%"
    statement = (
        select(WebhookEndpoint)
        .where(WebhookEndpoint.secret.not_like(current) | WebhookEndpoint.previous_secret.not_like(current))
        .order_by(WebhookEndpoint.id)
        .with_for_update(key_share=True)
    )
    return list(session.execute(statement).scalars())
