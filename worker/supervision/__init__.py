"""The supervisor's side: processes, embedded servers, health and signals."""
