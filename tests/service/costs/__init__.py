"""What a job would cost."""
