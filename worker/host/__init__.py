"""Facts of the machine and its processes: limits, data directory, endpoints, environment, priorities."""
