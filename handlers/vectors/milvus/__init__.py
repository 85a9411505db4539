"""Vector store on Milvus and Milvus Lite."""
