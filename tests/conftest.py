"""Settings for all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors run many times faster on one thread, and results do not depend on the number of cores."""
    torch.set_num_threads(1)
