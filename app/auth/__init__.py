"""Who asks: projects, API keys, scopes. Every route depends on a principal; see `dependency.py`."""
