"""The job store: ports, and their adapters for Redis and for memory."""
