"""The vector store on Milvus and Milvus Lite."""
