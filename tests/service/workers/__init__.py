"""The supervisor and its child."""
