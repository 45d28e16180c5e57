"""Projects and their API keys: made, listed, limited, revoked."""
