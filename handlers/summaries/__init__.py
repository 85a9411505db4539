"""Job types `summary_write_back` and `memory_update`."""
