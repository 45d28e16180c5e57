"""Who a request comes from, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_PROJECT_ID = "proj_" + "0" * 26
"""The project of every row from before there were projects, and of a local server's own user."""


class Scope(StrEnum):
    """What a key may do. None implies another, except that `admin` implies all."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    DATASETS_READ = "datasets:read"
    DATASETS_WRITE = "datasets:write"
    PROFILES_READ = "profiles:read"
    CHECKPOINTS_READ = "checkpoints:read"
    CHECKPOINTS_WRITE = "checkpoints:write"
    ARTIFACTS_READ = "artifacts:read"
    WEBHOOKS_MANAGE = "webhooks:manage"
    KEYS_MANAGE = "keys:manage"
    """Keys of the own project, with no scope that the managing key lacks."""
    ADMIN = "admin"
    """Projects, keys of every project, audit events; data of the own project only, as any other key."""


@dataclass(frozen=True)
class Principal:
    """The project that a request acts in, and on whose behalf.

    `actor` is a key's id, `local` for the owner of a loopback server, `cli` for whoever can reach the database
    itself, or `system` for the service's own doing. `owner`: may read on this machine what the server can read, since they
    are one user.
    """

    project_id: str
    actor: str
    scopes: frozenset[Scope]
    request_id: str | None = None
    owner: bool = False

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


def local_principal(request_id: str | None = None) -> Principal:
    """The owner of a server that only this machine can reach: everything, in the default project."""
    return Principal(DEFAULT_PROJECT_ID, "local", frozenset(Scope), request_id, owner=True)
