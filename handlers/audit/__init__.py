"""Job type `audit`."""
