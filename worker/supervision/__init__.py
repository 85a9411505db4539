"""Process supervision: child processes, embedded servers, health and signals."""
