"""What a project may use."""
