"""The offline checker: reads the tables and the object store and reports every broken promise.

It trusts nothing that the service computes: histories are replayed from the events, digests are taken of the stored
bytes. It only reads, in one snapshot of the database, so it may run beside a living service.
"""
