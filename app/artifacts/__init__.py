"""Artifacts: immutable files in the object store, visible once their row is committed."""
