"""Calibration datasets: uploaded once, then immutable."""
