"""Tests of the Python client. A package, so that its helpers can be imported."""
