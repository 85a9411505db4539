"""Functions as handlers: the decorator `job`, payload types, and the modules that `--app` names."""
