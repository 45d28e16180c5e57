"""What routes ask for: the settings, the database, the store, the page.

All are coroutines, though none waits: FastAPI runs a plain function in a thread, which costs more than what it does here.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from app.hints.dispatch import Dispatcher
from app.http.pagination import Cursor, Order
from app.infra.database import Database
from app.infra.storage import Storage
from app.settings import Settings


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


async def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


async def _cursor(
    after: Annotated[
        str | None, Query(max_length=40, description="`last_id` of the page before this one.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Order, Query(description="By creation.")] = "desc",
) -> Cursor:
    return Cursor(after, limit, order)


Db = Annotated[Database, Depends(_database)]
Store = Annotated[Storage, Depends(_storage)]
Config = Annotated[Settings, Depends(_settings)]
Hints = Annotated[Dispatcher, Depends(_dispatcher)]
PageCursor = Annotated[Cursor, Depends(_cursor)]
