"""Communication between the processes: rings, the in-flight table, crash marks and control sockets."""
