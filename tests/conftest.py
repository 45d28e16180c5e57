"""Settings for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors run many times faster on one thread, and results do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers of the tests show their tokens to clients of the tests alone, and leave nothing in a home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        for name in ("ORTHOKV_TOKEN", "ORTHOKV_TOKEN_FILE", "ORTHOKV_API_KEY"):
            patch.delenv(name, raising=False)
        yield
