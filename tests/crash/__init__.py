"""Tests that kill real processes. A package, so that helpers here and in `tests/` can be imported."""
