"""What clients may do with webhook endpoints and deliveries."""

from __future__ import annotations

import base64
import secrets

from sqlalchemy.orm import Session

from app.audit.service import record as audit
from app.auth.repository import lock_project
from app.http.errors import Code, FieldProblem, Problem, not_found
from app.http.pagination import Cursor, Page, page
from app.infra.database import clock, now
from app.infra.ids import new_id
from app.infra.outbound import Outbound, UrlRefused
from app.infra.sealing import Sealer
from app.principal import Principal
from app.webhooks import repository
from app.webhooks.models import WebhookDelivery as DeliveryRow
from app.webhooks.models import WebhookEndpoint as Row
from app.webhooks.schemas import (
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEndpointCreate,
    WebhookEndpointCreated,
    WebhookEndpointUpdate,
)

MAX_ENDPOINTS = 20
"""Of one project: each costs a row for every event."""
DISABLED = "The endpoint was disabled."
_SECRET_BYTES = 32


def create(
    session: Session,
    *,
    body: WebhookEndpointCreate,
    principal: Principal,
    sealer: Sealer | None,
    outbound: Outbound,
) -> WebhookEndpointCreated:
    sealer = _require(sealer)
    _check_url(body.url, outbound)
    lock_project(session, principal.project_id)
    if repository.count_endpoints(session, principal.project_id) >= MAX_ENDPOINTS:
        raise Problem(Code.QUOTA_EXCEEDED, f"A project may have {MAX_ENDPOINTS} webhook endpoints.")
    secret = _new_secret()
    row = Row(
        id=new_id("we"),
        project_id=principal.project_id,
        url=body.url,
        description=body.description,
        event_types=None if body.event_types is None else sorted(set(body.event_types)),
        cloud_events=body.cloud_events,
        secret=sealer.seal(secret),
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    audit(session, principal, "webhook_endpoint.created", row.id)
    return _created(row, secret)


def get(session: Session, *, endpoint_id: str, principal: Principal) -> WebhookEndpoint:
    row = repository.find_endpoint(session, endpoint_id, project_id=principal.project_id)
    if row is None:
        raise not_found("webhook endpoint")
    return WebhookEndpoint.model_validate(row)


def list_page(session: Session, *, cursor: Cursor, principal: Principal) -> Page[WebhookEndpoint]:
    rows, has_more = repository.list_endpoints(session, cursor, project_id=principal.project_id)
    return page([WebhookEndpoint.model_validate(row) for row in rows], has_more)


def change(
    session: Session,
    *,
    endpoint_id: str,
    body: WebhookEndpointUpdate,
    principal: Principal,
    outbound: Outbound,
) -> WebhookEndpoint:
    row = _lock(session, endpoint_id, principal)
    if body.url is not None:
        _check_url(body.url, outbound)
        row.url = body.url
    if body.description is not None:
        row.description = body.description
    if "event_types" in body.model_fields_set:
        row.event_types = None if body.event_types is None else sorted(set(body.event_types))
    if body.cloud_events is not None:
        row.cloud_events = body.cloud_events
    if body.enabled is False and row.enabled:
        disable(session, row, "client")
    elif body.enabled:
        row.enabled, row.disabled_reason, row.disabled_at = True, None, None
    audit(
        session, principal, "webhook_endpoint.changed", row.id, data={"fields": sorted(body.model_fields_set)}
    )
    session.flush()
    return WebhookEndpoint.model_validate(row)


def disable(session: Session, row: Row, reason: str) -> None:
    """Send nothing more, and nothing of what waits. The caller holds the endpoint's lock."""
    row.enabled, row.disabled_reason, row.disabled_at = False, reason, clock(session)
    repository.end_pending(session, row.id, error=DISABLED)


def delete(session: Session, *, endpoint_id: str, principal: Principal) -> None:
    row = _lock(session, endpoint_id, principal, to_delete=True)
    audit(session, principal, "webhook_endpoint.deleted", row.id)
    repository.delete_endpoint(session, row)


def rotate_secret(
    session: Session, *, endpoint_id: str, overlap_hours: float, principal: Principal, sealer: Sealer | None
) -> WebhookEndpointCreated:
    """A new secret; the present one signs beside it for a while, one from before ends at once."""
    sealer = _require(sealer)
    row = _lock(session, endpoint_id, principal)
    secret = _new_secret()
    row.previous_secret = row.secret if overlap_hours else None
    row.previous_secret_expires_at = now(overlap_hours * 3600) if overlap_hours else None
    row.secret = sealer.seal(secret)
    audit(session, principal, "webhook_endpoint.secret_rotated", row.id)
    session.flush()
    session.refresh(row)
    return _created(row, secret)


def deliveries(
    session: Session, *, endpoint_id: str, cursor: Cursor, principal: Principal, status: str | None
) -> Page[WebhookDelivery]:
    get(session, endpoint_id=endpoint_id, principal=principal)
    rows, has_more = repository.list_deliveries(session, cursor, endpoint_id=endpoint_id, status=status)
    return page([_delivery(row) for row in rows], has_more)


def redeliver(
    session: Session, *, endpoint_id: str, delivery_id: str, principal: Principal
) -> WebhookDelivery:
    """Send a delivery again, now, and from the beginning of the schedule."""
    endpoint = _lock(session, endpoint_id, principal)
    row = repository.lock_delivery(session, delivery_id, endpoint_id=endpoint.id)
    if row is None:
        raise not_found("webhook delivery")
    if not endpoint.enabled:
        raise Problem(Code.CONFLICT, "The endpoint is disabled.")
    if repository.is_being_sent(session, row.id):
        raise Problem(Code.CONFLICT, "The delivery is being sent just now.")
    row.status, row.failures, row.finished_at, row.error = "pending", 0, None, None
    row.next_attempt_at = clock(session)
    audit(session, principal, "webhook_delivery.redelivered", row.id)
    return _delivery(row)


def _delivery(row: DeliveryRow) -> WebhookDelivery:
    shown = WebhookDelivery.model_validate(row)
    return shown if row.status == "pending" else shown.model_copy(update={"next_attempt_at": None})


def _created(row: Row, secret: str) -> WebhookEndpointCreated:
    return WebhookEndpointCreated(**WebhookEndpoint.model_validate(row).model_dump(), secret=secret)


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def _require(sealer: Sealer | None) -> Sealer:
    if sealer is None:
        raise Problem(
            Code.WEBHOOKS_DISABLED,
            "This server has no key to encrypt secrets with, so it takes no webhook endpoints: "
            "its operator has to set ORTHOKV_SECRET_KEYS.",
        )
    return sealer


def _check_url(url: str, outbound: Outbound) -> None:
    try:
        outbound.check(url)
    except UrlRefused as error:
        field = FieldProblem(pointer="/url", code="url", message=str(error))
        raise Problem(Code.INVALID_REQUEST, "The URL cannot be used.", errors=[field]) from error


def _lock(session: Session, endpoint_id: str, principal: Principal, *, to_delete: bool = False) -> Row:
    row = repository.find_locked_endpoint(
        session, endpoint_id, project_id=principal.project_id, to_delete=to_delete
    )
    if row is None:
        raise not_found("webhook endpoint")
    return row
