"""What is deleted, and when its bytes go."""
