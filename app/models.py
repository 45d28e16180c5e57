"""Every table in one import, for migrations and for foreign keys that name each other."""

from app.artifacts.models import Artifact
from app.audit.models import AuditEvent
from app.auth.models import ApiKey, Project
from app.checkpoints.models import Checkpoint, CheckpointFile
from app.costs.models import RunCost
from app.datasets.models import Dataset
from app.idempotency.models import IdempotencyKey
from app.infra.database import Base
from app.infra.garbage import Garbage
from app.jobs.models import Event, Job, Layer, Step
from app.profiles.models import Profile
from app.webhooks.models import WebhookDelivery, WebhookEndpoint

metadata = Base.metadata

__all__ = [
    "ApiKey",
    "Artifact",
    "AuditEvent",
    "Checkpoint",
    "CheckpointFile",
    "Dataset",
    "Event",
    "Garbage",
    "IdempotencyKey",
    "Job",
    "Layer",
    "Profile",
    "Project",
    "RunCost",
    "Step",
    "WebhookDelivery",
    "WebhookEndpoint",
    "metadata",
]
