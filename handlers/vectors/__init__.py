"""The vector store: ports, checks, and adapters for Milvus and memory."""
