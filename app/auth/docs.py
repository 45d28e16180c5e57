"""The pages that show the API to people: public where keys guard it, the owner's on a loopback server.

A browser sends no token by itself. So the address that `orthokv serve` prints bears it once: it is changed for a cookie,
which opens these pages and nothing else, since a browser sends the cookies of one port of the loopback to every other.
"""

from __future__ import annotations

import hashlib
import hmac

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse, Response

from app.auth.dependency import bearer, identify
from app.auth.owner import is_owner
from app.http.dependencies import Config, Db
from app.settings import Settings

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def pages(request: Request, db: Db, settings: Config, token: str = "") -> Response:
    """Swagger's pages. With the owner's token in the query: a cookie, and the address without it."""
    root = request.scope.get("root_path", "").rstrip("/")
    if is_owner(token, settings):
        answer = RedirectResponse(f"{root}/docs", status_code=303)
        answer.set_cookie(_name(request), _pass(settings), httponly=True, samesite="strict")
        return answer
    await _admit(request, db, settings)
    return get_swagger_ui_html(openapi_url=f"{root}/openapi.json", title=request.app.title)


@router.get("/openapi.json")
async def document(request: Request, db: Db, settings: Config) -> JSONResponse:
    """The OpenAPI document."""
    await _admit(request, db, settings)
    return JSONResponse(request.app.openapi())


async def _admit(request: Request, db: Db, settings: Settings) -> None:
    """Raises 401 where the pages are the owner's and nobody who may read them asks."""
    if settings.auth_required:
        return  # they tell nothing that is not in the repository
    shown = request.cookies.get(_name(request), "")
    if settings.token.get_secret_value() and hmac.compare_digest(shown.encode(), _pass(settings).encode()):
        return
    await identify(request, db, settings, await bearer(request))


def _name(request: Request) -> str:
    """A name for each server of the machine: ports of one host share their cookies."""
    return f"orthokv-docs-{request.url.port or 80}"


def _pass(settings: Settings) -> str:
    """What the cookie holds: it follows from the token, and nobody can go the other way."""
    return hmac.new(settings.token.get_secret_value().encode(), b"docs", hashlib.sha256).hexdigest()
