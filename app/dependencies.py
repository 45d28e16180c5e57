"""What routes ask for: the settings, the database, the store, the page."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from app.audit.window import NotedOnce
from app.database import Database
from app.jobs.dispatch import Dispatcher
from app.pagination import Cursor, Order
from app.settings import Settings
from app.storage import Storage


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def _downloads(request: Request) -> NotedOnce:
    downloads: NotedOnce = request.app.state.downloads
    return downloads


def _cursor(
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
Downloads = Annotated[NotedOnce, Depends(_downloads)]
Hints = Annotated[Dispatcher, Depends(_dispatcher)]
PageCursor = Annotated[Cursor, Depends(_cursor)]
