"""Of the tests over all architectures `make test` runs those of one architecture a family, `make test-slow` the rest."""

from __future__ import annotations

import pytest

from tests.support.tiny import ARCHITECTURES, FAMILIES

# Files whose tests take seconds an architecture. What each architecture has of its own is tested by the others, in
# milliseconds, and by the invariants, which choose for themselves.
SAMPLED = {
    "test_checkpoint.py",
    "test_methods.py",
    "test_pipeline.py",
    "test_positions.py",
    "test_published_methods.py",
    "test_streaming.py",
    "test_threads.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.path.name in SAMPLED and hasattr(item, "callspec"):
            named = {value for value in item.callspec.params.values() if isinstance(value, str)}
            if named & set(ARCHITECTURES) and not named & set(FAMILIES):
                item.add_marker(pytest.mark.slow)
