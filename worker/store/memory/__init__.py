"""In-memory job store for the test harness."""
