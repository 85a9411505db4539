"""Installed files: only `jobworker/`, so a package named `supervisor` can be installed beside it."""

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("worker", "handlers", "tests", "bench", "samples", "scripts", "systemd", "docs")
FILES = (
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "constraints.txt",
    "supervisor.py",
)


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built through the source archive, from a copy: a build leaves its folders in the tree it builds."""
    source = tmp_path_factory.mktemp("source")
    for room in ROOMS:
        if (ROOT / room).is_dir():
            shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel and, as PyPI's project would bring it, a `supervisor`."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    theirs = (
        Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home))
        / "supervisor"
    )
    theirs.mkdir()  # fails where our wheel had put one there
    (theirs / "__init__.py").write_text("OWNER = 'theirs'\n")
    return home


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if ".dist-info/" not in name}
    code = {
        f"jobworker/{file.relative_to(ROOT).as_posix()}"
        for room in ("worker", "handlers")
        for file in (ROOT / room).rglob("*")
        if file.suffix in {".py", ".lua"} or file.name == "py.typed"
    }
    page, api = ROOT / "worker" / "web", ROOT / "handlers" / "api"
    code |= {
        f"jobworker/{file.relative_to(ROOT).as_posix()}"
        for folder in (page / "templates", page / "static", api / "templates")
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert ours == code | {"jobworker/supervisor.py"}
    assert {"jobworker/worker/py.typed", "jobworker/handlers/py.typed"} <= ours
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_installs_beside_another_supervisor(environment: Path) -> None:
    # Dependencies come from where this test runs, as a plain folder: its editable install stays out.
    code = (
        f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "import supervisor, jobworker.supervisor, jobworker.worker, jobworker.handlers\n"
        "print(supervisor.OWNER, jobworker.supervisor.__file__, jobworker.worker.__file__, sep='\\n')"
    )
    owner, *ours = run(environment / "bin" / "python", "-c", code, cwd=environment).splitlines()
    assert owner == "theirs"
    assert all(path.startswith(f"{environment}/lib") for path in ours)


def test_commands_are_installed(environment: Path) -> None:
    """Started as a person would; the dependencies come from where this test runs."""
    for command in ("jobworker-supervise", "jobworker"):
        code = (
            f"import sys, runpy; sys.path.append({sysconfig.get_path('purelib')!r})\n"
            "sys.argv[1:] = ['--help']\n"
            f"runpy.run_path({str(environment / 'bin' / command)!r}, run_name='__main__')"
        )
        assert "Usage:" in run(environment / "bin" / "python", "-c", code, cwd=environment)


def test_version_is_the_changelogs() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    top = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert top is not None
    assert config["metadata"]["version"] == top[1]
