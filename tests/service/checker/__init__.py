"""The checker of the database."""
