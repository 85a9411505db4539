"""An installation without extras, imitated: modules of packages that the base does not require are missing.

In the folder of a `sitecustomize.py` that calls `hide`, every Python process is such an installation.
"""

import configparser
import importlib.abc
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SITECUSTOMIZE = (
    f"import sys; sys.path.append({str(ROOT / 'tests')!r}); from support import slim; slim.hide()\n"
)


def base_packages() -> set[str]:
    """Names of the packages that an installation without extras brings along."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    left = [_name(line) for line in config["options"]["install_requires"].split("\n") if line]
    found: set[str] = set()
    while left:
        package = left.pop()
        if package in found:
            continue
        found.add(package)
        try:
            requirements = metadata.requires(package) or []
        except metadata.PackageNotFoundError:  # for other versions of Python only
            continue
        left += [_name(one) for one in requirements if "extra ==" not in one]
    return found


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement.strip())[0].lower().replace("_", "-")


class _Hidden(importlib.abc.MetaPathFinder):
    def __init__(self, modules: set[str]) -> None:
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in self._modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def hide() -> None:
    """Hide the modules of all other packages of this environment from this process."""
    base = base_packages() | {"jobworker"}
    owners = metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not {_name(name) for name in names} & base}
    sys.meta_path.insert(0, _Hidden(hidden))
