"""The dependency of routes that create something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Protocol

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.http.dependencies import Config, Db
from app.http.errors import Code
from app.idempotency.service import Answer, once
from app.principal import Principal


class Created(Protocol):
    """A resource just made."""

    @property
    def id(self) -> str: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class Creation:
    """A creating request: its path, its key and the transaction in which it makes a resource."""

    def __init__(
        self,
        request: Request,
        db: Db,
        settings: Config,
        key: Annotated[
            str | None,
            Header(
                alias="Idempotency-Key",
                description="1 to 255 visible ASCII characters. A repetition with the same key and body "
                "gets the first answer again, with `Idempotent-Replayed: true`.",
            ),
        ] = None,
    ) -> None:
        self._db = db
        self._key = key
        self._path = request.url.path
        self._keep_hours = settings.idempotency_hours

    async def run(
        self,
        body: BaseModel,
        make: Callable[[Session], Created],
        *,
        principal: Principal,
        status_code: int,
        collection: str,
    ) -> JSONResponse:
        """Answer with what `make` makes, found under `collection`."""

        def work(session: Session) -> Answer:
            def create() -> Answer:
                made = make(session)
                return Answer(status_code, made.model_dump(mode="json"), f"{collection}/{made.id}")

            return once(
                session,
                project_id=principal.project_id,
                key=self._key,
                path=self._path,
                body=body,
                keep_hours=self._keep_hours,
                create=create,
            )

        return (await self._db.write(work)).response()


Once = Annotated[Creation, Depends()]
CREATION_CODES = (
    Code.INVALID_IDEMPOTENCY_KEY,
    Code.IDEMPOTENCY_KEY_REUSED,
    Code.BODY_TOO_LARGE,
    Code.UNSUPPORTED_MEDIA_TYPE,
    Code.FOREIGN_ORIGIN,
)
