"""What the generated models have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A body. Fields that a newer server adds to answers are ignored."""

    # Built when first used: a program pays for the bodies that it meets.
    model_config = ConfigDict(extra="ignore", defer_build=True, protected_namespaces=())
