"""Error-rank profiles: the durable product of a job, from which checkpoints for other budgets are made."""
