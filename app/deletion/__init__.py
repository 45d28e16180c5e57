"""Deletion and retention: rows go at once, and leave the keys of their objects to the sweep that frees the bytes."""
