"""The handler of `embedding_batch`."""
