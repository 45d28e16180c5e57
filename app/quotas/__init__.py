"""Quotas of projects: queued jobs, running steps, stored bytes, the largest dataset."""
