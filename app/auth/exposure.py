"""What a server may be reached by, and what that asks of its settings."""

from __future__ import annotations

import ipaddress

from app.auth.repository import has_usable_key
from app.infra.database import SyncDatabase
from app.settings import Settings


class Exposed(Exception):
    """The server would let strangers in."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def others_can_reach(settings: Settings, host: str) -> str | None:
    """The address or host name by which more than this machine is meant to reach the server, if any."""
    return next((name for name in (host, *settings.allowed_hosts) if not is_loopback(name)), None)


def require_auth(settings: Settings, host: str) -> None:
    """Refuse to be reached by others without asking for keys."""
    name = others_can_reach(settings, host)
    if name is not None and not settings.auth_required:
        raise Exposed(f"{name} is not a loopback address, so ORTHOKV_AUTH_REQUIRED must not be false")


def require_key(settings: Settings, host: str) -> None:
    """Refuse to be reached by others before there is a key: nobody could use the server. Needs the schema."""
    name = others_can_reach(settings, host)
    if name is None:
        return
    database = SyncDatabase(settings.resolved_database_url)
    try:
        if not database.read(has_usable_key):
            raise Exposed(
                f"{name} is not a loopback address, and there is no API key yet: see 'orthokv keys create'"
            )
    finally:
        database.close()
