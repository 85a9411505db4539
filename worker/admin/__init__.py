"""What operators do, without a face: the command line and the web page are built on it."""
