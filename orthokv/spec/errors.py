"""Errors that OrthoKV raises on purpose. Each names the value at fault in one sentence.

`code` is the closed vocabulary that the service and the command line pass on; it never changes meaning.
"""

from __future__ import annotations


class OrthoKVError(Exception):
    """Base of every error that is not a bug."""

    code = "internal"


class InvalidSetting(OrthoKVError, ValueError):
    """A setting is outside its range or contradicts another one."""

    code = "invalid_setting"


class ModelNotFound(OrthoKVError):
    """The model id or folder does not exist, or cannot be reached."""

    code = "model_not_found"


class ModelGated(OrthoKVError):
    """The hub refused access to the model."""

    code = "model_gated"


class UnsafeModel(OrthoKVError):
    """The model would need code or pickles to load: refused."""

    code = "model_unsafe_format"


class ModelTooLarge(OrthoKVError):
    """The model's weights have more bytes than may be loaded here."""

    code = "model_too_large"


class UnsupportedModel(OrthoKVError):
    """The architecture, or a feature of it, is not supported."""

    code = "model_unsupported"


class InvalidModel(OrthoKVError):
    """The model's files are incomplete or its weights are not finite."""

    code = "model_invalid"


class InvalidDataset(OrthoKVError):
    """The calibration or evaluation text cannot be used."""

    code = "dataset_invalid"


class InvalidCheckpoint(OrthoKVError):
    """A checkpoint or profile is truncated, altered, foreign, or of another version."""

    code = "checkpoint_invalid"


class CheckpointMismatch(InvalidCheckpoint):
    """A sound checkpoint that belongs to another model, geometry or rotary embedding."""

    code = "checkpoint_mismatch"


class StorageError(OrthoKVError):
    """Writing failed (a full disk, a read-only folder); nothing half-written was left behind."""

    code = "storage_error"


class PushFailed(OrthoKVError):
    """The hub refused a checkpoint, or cannot be reached."""

    code = "push_failed"


class BudgetUnreachable(OrthoKVError):
    """No plan meets the budget.

    `best` is the closest value of the budget's own measure that a plan reaches, `asked` what was wanted.
    """

    code = "budget_unreachable"

    def __init__(self, message: str, *, asked: float, best: float) -> None:
        super().__init__(message)
        self.asked = asked
        self.best = best
