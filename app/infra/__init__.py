"""What the service reaches the world through: database, object store, outgoing HTTP, traces, logs."""
