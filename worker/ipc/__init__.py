"""What the processes share: rings, the in-flight table and control sockets."""
