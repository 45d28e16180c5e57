"""The commands that start the service."""
