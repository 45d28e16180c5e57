"""Tests of what is neither library nor service: images, manifests, benchmarks."""
