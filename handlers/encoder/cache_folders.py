"""Folders for what is computed once for a model: converted models and hashes of files."""

import contextlib
import os
from pathlib import Path


def cache_folders() -> list[Path]:
    """Folders that may hold converted models, in order of preference: the service's, then the user's."""
    names = [os.environ.get("CACHE_DIRECTORY", "").split(":")[0]]
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not home:
        with contextlib.suppress(RuntimeError):  # no HOME and no entry in the user table
            home = str(Path.home() / ".cache")
    names.append(f"{home}/jobworker" if home else "")
    names.append(os.environ.get("STATE_DIRECTORY", "").split(":")[0])
    return [Path(name) / "models" for name in names if name]
