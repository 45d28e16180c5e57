"""The version of this library, as profiles and checkpoints record it."""

from __future__ import annotations

from orthokv.spec.records import Producer

VERSION = "0.1.0"


def producer() -> Producer:
    """Who wrote a file."""
    return {"name": "orthokv", "version": VERSION}
