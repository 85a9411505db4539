"""Job type `embedding_batch`: texts become vectors and rows."""
