"""The dependency of every route that is not public: a principal with the scope that the route needs.

A dependency, not a middleware: what is checked belongs to the route that runs, so no spelling of the path and
no Host header leads around it. `tests/service/auth/test_auth_walk.py` calls every route without a key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.auth import repository
from app.auth.check import check_key
from app.auth.owner import is_owner
from app.auth.rate import RateLimit
from app.http.dependencies import Config, Db
from app.http.errors import Code, Problem, documented, request_id_of
from app.infra.keys import is_token
from app.principal import Principal, Scope, local_principal

AUTH_CODES = (Code.UNAUTHENTICATED, Code.INSUFFICIENT_SCOPE, Code.RATE_LIMITED)
_REALM = 'Bearer realm="orthokv"'

bearer = HTTPBearer(
    scheme_name="apiKey",
    bearerFormat="okv_<id>_<secret>_<checksum>",
    description="An API key; on a server that listens on the loopback only, also its owner's token.",
    auto_error=False,
)


async def identify(
    request: Request,
    db: Db,
    settings: Config,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Principal:
    """Whoever sent the request, whatever he may do; raises 401 or 429."""
    request_id = request_id_of(request)
    if "authorization" not in request.headers:
        needed = (
            "An API key" if settings.auth_required else "The token of this server's owner, or an API key,"
        )
        raise Problem(
            Code.UNAUTHENTICATED,
            f"{needed} is needed: send it as 'Authorization: Bearer okv_...'.",
            headers={"WWW-Authenticate": _REALM},
        )
    text = "" if credentials is None else credentials.credentials
    if is_owner(text, settings):
        return local_principal(request_id)
    found = await db.read(check_key, text, pepper=settings.key_pepper.get_secret_value())
    if found is None:
        what = "This token is not of this server, or of an earlier start of it."
        known = "This API key is not valid: it is unknown, revoked or expired."
        raise Problem(
            Code.UNAUTHENTICATED,
            what if is_token(text) else known,
            headers={"WWW-Authenticate": f'{_REALM}, error="invalid_token"'},
        )
    principal, use_is_due = found
    limit: RateLimit = request.app.state.rate_limit
    limit.take(principal.actor)
    if use_is_due:
        await db.write(repository.note_use, principal.actor)
    return replace(principal, request_id=request_id)


class Require:
    """Gives the principal of a request, or refuses with 401, 403 or 429."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(
        self,
        request: Request,
        db: Db,
        settings: Config,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> Principal:
        principal = await identify(request, db, settings, credentials)
        if not principal.may(self.scope):
            raise Problem(
                Code.INSUFFICIENT_SCOPE,
                f"This API key lacks the scope '{self.scope}'.",
                headers={"WWW-Authenticate": f'{_REALM}, error="insufficient_scope", scope="{self.scope}"'},
            )
        return principal


def guarded(*codes: Code) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route that depends on a principal."""
    return documented(*codes, *AUTH_CODES)


JobsRead = Annotated[Principal, Security(Require(Scope.JOBS_READ), scopes=[Scope.JOBS_READ])]
JobsWrite = Annotated[Principal, Security(Require(Scope.JOBS_WRITE), scopes=[Scope.JOBS_WRITE])]
DatasetsRead = Annotated[Principal, Security(Require(Scope.DATASETS_READ), scopes=[Scope.DATASETS_READ])]
DatasetsWrite = Annotated[Principal, Security(Require(Scope.DATASETS_WRITE), scopes=[Scope.DATASETS_WRITE])]
ProfilesRead = Annotated[Principal, Security(Require(Scope.PROFILES_READ), scopes=[Scope.PROFILES_READ])]
CheckpointsRead = Annotated[
    Principal, Security(Require(Scope.CHECKPOINTS_READ), scopes=[Scope.CHECKPOINTS_READ])
]
CheckpointsWrite = Annotated[
    Principal, Security(Require(Scope.CHECKPOINTS_WRITE), scopes=[Scope.CHECKPOINTS_WRITE])
]
ArtifactsRead = Annotated[Principal, Security(Require(Scope.ARTIFACTS_READ), scopes=[Scope.ARTIFACTS_READ])]
WebhooksManage = Annotated[
    Principal, Security(Require(Scope.WEBHOOKS_MANAGE), scopes=[Scope.WEBHOOKS_MANAGE])
]
KeysManage = Annotated[Principal, Security(Require(Scope.KEYS_MANAGE), scopes=[Scope.KEYS_MANAGE])]
Admin = Annotated[Principal, Security(Require(Scope.ADMIN), scopes=[Scope.ADMIN])]
