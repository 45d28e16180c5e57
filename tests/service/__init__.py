"""Tests of the service. A package, so that helpers here and in `tests/` can be imported."""
