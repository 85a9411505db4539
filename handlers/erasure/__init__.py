"""Job type `vectors_delete`: rows, records and cached vectors of a scope are deleted."""
