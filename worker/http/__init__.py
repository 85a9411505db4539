"""HTTP servers of the service: sockets, bearer tokens, uvicorn with limits."""
