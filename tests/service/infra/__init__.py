"""Database, object store, outgoing HTTP, logs, traces."""
