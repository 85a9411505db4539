"""Operator functions without a user interface: the command line and the web page are built on them."""
