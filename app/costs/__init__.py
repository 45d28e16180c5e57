"""What jobs cost: the seconds of past steps, and an estimate for a job before anybody pays for it."""
