"""The configuration file: its options and tables, durations and quantities."""
