"""The job store in memory, for the test harness: same answers, a clock of its own."""
