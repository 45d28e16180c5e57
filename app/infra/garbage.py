"""Table of objects whose rows are gone."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from app.infra.database import Base, UtcDateTime, now


class Garbage(Base):
    """The tombstone of an object: written in the transaction that deletes its row, gone when its bytes are."""

    __tablename__ = "garbage"

    object_key: Mapped[str] = mapped_column(String(512), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now(), index=True)
