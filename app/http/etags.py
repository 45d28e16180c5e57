"""Entity tags (RFC 9110, section 8.8.3)."""

from __future__ import annotations


def matches(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names this tag (by the weak comparison that the header asks for)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags
