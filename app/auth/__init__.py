"""Who asks: API keys and their scopes. Every route depends on a principal; see `dependency.py`."""
