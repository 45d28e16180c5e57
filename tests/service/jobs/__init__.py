"""Jobs: over HTTP, their states, leases and repairs."""
