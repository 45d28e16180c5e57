"""Hints: "there may be work". They only wake; the database decides, so a lost hint costs one poll interval."""
