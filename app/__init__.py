"""The OrthoKV service.

Jobs, datasets, profiles, checkpoints and artifacts over HTTP. It knows no linear algebra.
"""
