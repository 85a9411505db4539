"""The handler of `index_rebuild`."""
