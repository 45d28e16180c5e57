"""Ended jobs as MLflow runs, their checkpoints as registered model versions: a client of the API, outside of any job."""
