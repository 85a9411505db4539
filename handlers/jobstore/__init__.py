"""State of handlers in the job store: write admission, rebuild state and records."""
