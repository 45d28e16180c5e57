"""Where hints go: through the broker, or without one through the data folder."""

from __future__ import annotations

from typing import Protocol

from app.hints.pipe import LocalDispatcher
from app.settings import DEFAULT_GPU_CLASS, Settings


class Dispatcher(Protocol):
    """Where hints go. The claim does not depend on them."""

    def hint(self, gpu_class: str = DEFAULT_GPU_CLASS) -> None:
        """Wake a worker of this class if one is listening. Never raises, never blocks."""

    def close(self) -> None:
        """Send what is still to be sent, within bounded time."""


def make_dispatcher(settings: Settings) -> Dispatcher:
    """Hints through the broker, or without one through the data folder."""
    if not settings.broker_url:
        return LocalDispatcher(settings.wake_file)
    from app.hints.broker import CeleryDispatcher  # its library is installed only where there is a broker

    return CeleryDispatcher(settings.broker_url)
