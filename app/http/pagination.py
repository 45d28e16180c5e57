"""Keyset pages.

`after` is the id of the last item seen, so a page never skips or repeats while rows are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.http.errors import Code, Problem

T = TypeVar("T")
Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Cursor:
    """Where a page starts and how long it is."""

    after: str | None = None
    limit: int = 20
    order: Order = "desc"


class Page(BaseModel, Generic[T]):
    """One page. Ask for the next with `after=last_id` while `has_more`."""

    model_config = ConfigDict(frozen=True)

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Identified(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


def page(data: list[Item], has_more: bool) -> Page[Item]:
    """The page that these items make."""
    return Page(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


def cut(
    session: Session,
    statement: Select[T],
    key: InstrumentedAttribute[str],
    cursor: Cursor,
    *,
    within: ColumnElement[bool],
) -> tuple[list[T], bool]:
    """The rows of one page and whether more follow. `within`: which rows the client may see at all.

    An unknown `after`, or one that lies outside of `within`, is an error, never page one.
    """
    statement = statement.where(within)
    if cursor.after is not None:
        if session.execute(select(key).where(key == cursor.after, within)).one_or_none() is None:
            raise Problem(Code.INVALID_CURSOR, "The 'after' parameter names no item of this list.")
        statement = statement.where(key < cursor.after if cursor.order == "desc" else key > cursor.after)
    ordered = statement.order_by(key.desc() if cursor.order == "desc" else key.asc()).limit(cursor.limit + 1)
    rows = list(session.execute(ordered).scalars())
    return rows[: cursor.limit], len(rows) > cursor.limit
