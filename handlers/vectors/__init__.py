"""Vector store: ports, validation of rows, and adapters for Milvus and memory."""
