"""Job type `index_rebuild`."""
