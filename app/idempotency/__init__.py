"""Idempotency keys: a repeated POST gets the first answer instead of a second resource."""
