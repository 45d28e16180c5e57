"""Events of a job: a gapless, ordered record, served as pages and as a stream."""
