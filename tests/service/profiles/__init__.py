"""Profiles and the checkpoints made of them."""
