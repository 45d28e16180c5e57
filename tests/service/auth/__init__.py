"""Who may do what: keys, projects, scopes."""
