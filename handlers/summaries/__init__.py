"""The handler of `summary_write_back` and `memory_update`."""
