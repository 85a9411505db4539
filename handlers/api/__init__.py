"""HTTP API: embeddings and search for clients that ask."""
