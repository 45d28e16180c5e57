"""Compressed checkpoints: a manifest of artifacts with the plan and the measured quality."""
