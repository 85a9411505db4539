"""The job store on Redis or Valkey: each state change is one Lua script."""
