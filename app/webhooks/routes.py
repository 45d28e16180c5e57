"""Routes of webhook endpoints and their deliveries."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from app.auth.dependency import WebhooksManage, guarded
from app.http.dependencies import Db, PageCursor
from app.http.errors import Code
from app.http.pagination import Page
from app.http.routing import BoundedRoute
from app.infra.ids import id_pattern
from app.infra.outbound import Outbound
from app.infra.sealing import Sealer
from app.webhooks import service
from app.webhooks.schemas import (
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEndpointCreate,
    WebhookEndpointCreated,
    WebhookEndpointUpdate,
    WebhookSecretRotate,
)

router = APIRouter(prefix="/v1/webhook_endpoints", tags=["webhook_endpoints"], route_class=BoundedRoute)
EndpointId = Annotated[str, Path(pattern=id_pattern("we"))]
DeliveryId = Annotated[str, Path(pattern=id_pattern("msg"))]
_WRITE = (Code.FOREIGN_ORIGIN, Code.NOT_FOUND)
_BODY = (Code.BODY_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE)


def _sealer(request: Request) -> Sealer | None:
    sealer: Sealer | None = request.app.state.sealer
    return sealer


def _outbound(request: Request) -> Outbound:
    outbound: Outbound = request.app.state.outbound
    return outbound


Seals = Annotated[Sealer | None, Depends(_sealer)]
Out = Annotated[Outbound, Depends(_outbound)]


@router.post(
    "",
    status_code=201,
    operation_id="webhook_endpoints.create",
    responses=guarded(Code.FOREIGN_ORIGIN, Code.QUOTA_EXCEEDED, Code.WEBHOOKS_DISABLED, *_BODY),
)
async def create(
    body: WebhookEndpointCreate, principal: WebhooksManage, db: Db, sealer: Seals, outbound: Out
) -> WebhookEndpointCreated:
    """Be told about the project's jobs. The secret is in this answer and nowhere else, so this route takes no
    idempotency key."""
    return await db.write(service.create, body=body, principal=principal, sealer=sealer, outbound=outbound)


@router.get("", operation_id="webhook_endpoints.list", responses=guarded(Code.INVALID_CURSOR))
async def list_page(principal: WebhooksManage, db: Db, cursor: PageCursor) -> Page[WebhookEndpoint]:
    return await db.read(service.list_page, cursor=cursor, principal=principal)


@router.get("/{endpoint_id}", operation_id="webhook_endpoints.get", responses=guarded(Code.NOT_FOUND))
async def get(endpoint_id: EndpointId, principal: WebhooksManage, db: Db) -> WebhookEndpoint:
    return await db.read(service.get, endpoint_id=endpoint_id, principal=principal)


@router.patch("/{endpoint_id}", operation_id="webhook_endpoints.update", responses=guarded(*_WRITE, *_BODY))
async def update(
    endpoint_id: EndpointId, body: WebhookEndpointUpdate, principal: WebhooksManage, db: Db, outbound: Out
) -> WebhookEndpoint:
    """Change an endpoint. `enabled: false` ends what waits to be sent; `true` begins anew with the next event."""
    return await db.write(
        service.change, endpoint_id=endpoint_id, body=body, principal=principal, outbound=outbound
    )


@router.delete(
    "/{endpoint_id}",
    status_code=204,
    response_class=Response,
    operation_id="webhook_endpoints.delete",
    responses=guarded(*_WRITE),
)
async def delete(endpoint_id: EndpointId, principal: WebhooksManage, db: Db) -> None:
    """Delete an endpoint, its secrets and its deliveries."""
    await db.write(service.delete, endpoint_id=endpoint_id, principal=principal)


@router.post(
    "/{endpoint_id}/rotate_secret",
    operation_id="webhook_endpoints.rotate_secret",
    responses=guarded(*_WRITE, Code.WEBHOOKS_DISABLED, *_BODY),
)
async def rotate_secret(
    endpoint_id: EndpointId, body: WebhookSecretRotate, principal: WebhooksManage, db: Db, sealer: Seals
) -> WebhookEndpointCreated:
    """Make a new secret. Until `previous_secret_expires_at` each request bears a signature of both."""
    return await db.write(
        service.rotate_secret,
        endpoint_id=endpoint_id,
        overlap_hours=body.overlap_hours,
        principal=principal,
        sealer=sealer,
    )


@router.get(
    "/{endpoint_id}/deliveries",
    operation_id="webhook_endpoints.deliveries",
    responses=guarded(Code.INVALID_CURSOR, Code.NOT_FOUND),
)
async def deliveries(
    endpoint_id: EndpointId,
    principal: WebhooksManage,
    db: Db,
    cursor: PageCursor,
    status: Annotated[Literal["pending", "succeeded", "failed"] | None, Query()] = None,
) -> Page[WebhookDelivery]:
    """Messages to this endpoint and how they fared."""
    return await db.read(
        service.deliveries, endpoint_id=endpoint_id, cursor=cursor, principal=principal, status=status
    )


@router.post(
    "/{endpoint_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    operation_id="webhook_endpoints.redeliver",
    responses=guarded(*_WRITE, Code.CONFLICT),
)
async def redeliver(
    endpoint_id: EndpointId, delivery_id: DeliveryId, principal: WebhooksManage, db: Db
) -> WebhookDelivery:
    """Send a message again, with the same `webhook-id`."""
    return await db.write(
        service.redeliver, endpoint_id=endpoint_id, delivery_id=delivery_id, principal=principal
    )
