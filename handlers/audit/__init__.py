"""The handler of `audit`."""
