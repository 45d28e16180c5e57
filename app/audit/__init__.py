"""Audit events: who did what, when, by which request. Rows are added and never change."""
