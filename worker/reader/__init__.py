"""The reader role: owns the consumer groups, dispatches jobs to workers, settles outcomes."""
