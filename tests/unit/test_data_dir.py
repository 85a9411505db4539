"""Data directory: what another user made beforehand is refused, and no symbolic link is followed."""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobworker.worker.cli import main
from jobworker.worker.errors import ConfigurationError, Exit
from jobworker.worker.host.data_dir import DataDir, kept_secret, private_folder, write_private
from jobworker.worker.host.endpoints import DEFAULT_DATA_DIR, read_endpoints, store_url
from jobworker.worker.settings import Settings
from jobworker.worker.supervision.embedded import EmbeddedValkey, Stores, escaped_pattern, quoted
from jobworker.worker.supervision.instance import InstanceLock

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="root: only it can give files to another user")
STRANGER = 54321


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own ones are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def open_data(folder: Path) -> None:
    DataDir(str(folder)).close()


def lock_instance(folder: Path) -> None:
    InstanceLock(Settings(data_dir=str(folder))).close()


@AS_ROOT
@pytest.mark.parametrize("use", [open_data, lock_instance])
def test_a_folder_of_another_user_is_refused(folder: Path, use: Callable[[Path], None]) -> None:
    os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(ConfigurationError, match=f"belongs to another user .uid {STRANGER}"):
        use(folder)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o722, 0o2775])
@pytest.mark.parametrize("use", [open_data, lock_instance])
def test_a_folder_that_others_may_write_to_is_refused(
    folder: Path, use: Callable[[Path], None], mode: int
) -> None:
    folder.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod go-w"):
        use(folder)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_folder_that_others_may_only_read_is_used(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    open_data(folder)
    lock_instance(folder)
    assert folder.stat().st_mode & 0o777 == mode


@AS_ROOT
@pytest.mark.parametrize("name", ["lock", "endpoints.json", "valkey", "valkey/password", "valkey/valkey.log"])
def test_a_file_of_another_user_is_refused(folder: Path, name: str) -> None:
    planted = folder / name
    planted.parent.mkdir(exist_ok=True, mode=0o700)
    planted.mkdir() if name == "valkey" else planted.write_text("{}")
    os.chown(planted, STRANGER, STRANGER)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        EmbeddedValkey(DataDir(str(folder)))


@AS_ROOT
@pytest.mark.parametrize("name", ["audit", "embedding-cache.sqlite3"])
@pytest.mark.parametrize("use", [open_data, lock_instance])
def test_what_another_user_left_for_the_handlers_is_refused(
    folder: Path, tmp_path: Path, use: Callable[[Path], None], name: str
) -> None:
    (folder / name).symlink_to(tmp_path)
    use(folder)
    os.chown(folder / name, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        use(folder)


@pytest.mark.parametrize(
    "name",
    ["lock", "endpoints.json", "valkey", "valkey/password", "valkey/valkey.conf", "valkey/valkey.log"],
)
def test_a_symbolic_link_is_refused_and_its_target_stays(folder: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.mkdir() if name == "valkey" else target.write_text("precious")
    planted = folder / name
    planted.parent.mkdir(exist_ok=True, mode=0o700)
    planted.symlink_to(target)
    with pytest.raises(ConfigurationError, match="symbolic link"):
        EmbeddedValkey(DataDir(str(folder)))
    assert list(target.iterdir()) == [] if name == "valkey" else target.read_text() == "precious"


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder: Path) -> None:
    for name in ("lock", "endpoints.json", "secret"):
        os.mkfifo(folder / name)
    with pytest.raises(ConfigurationError):
        open_data(folder)
    with pytest.raises(ConfigurationError):
        read_endpoints(str(folder))
    with pytest.raises(ConfigurationError):
        kept_secret(folder / "secret")


def test_a_draft_that_somebody_planted_is_not_written_through(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (folder / "valkey.conf.draft").symlink_to(target)
    write_private(folder / "valkey.conf", "new")
    assert (target.read_text(), (folder / "valkey.conf").read_text()) == ("precious", "new")
    assert stat.S_IMODE((folder / "valkey.conf").stat().st_mode) == 0o600


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match="data directory"):
            open_data(path)


def test_a_private_folder_gets_its_mode_back(folder: Path) -> None:
    (folder / "valkey").mkdir(mode=0o755)
    (folder / "valkey" / "appendonlydir").mkdir()
    assert stat.S_IMODE(private_folder(folder / "valkey").stat().st_mode) == 0o700


def test_the_tool_reads_the_addresses_and_creates_nothing(folder: Path, tmp_path: Path) -> None:
    assert read_endpoints(str(folder)) == {}
    assert read_endpoints(str(tmp_path / "none" / "below")) == {}
    assert list(folder.iterdir()) == []
    write_private(folder / "endpoints.json", json.dumps({"redis_url": "redis://h"}))
    assert read_endpoints(str(folder)) == {"redis_url": "redis://h"}
    (folder / "endpoints.json").write_text("[1]")
    assert read_endpoints(str(folder)) == {}


@AS_ROOT
def test_the_tool_and_the_producer_trust_the_same_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(DEFAULT_DATA_DIR).mkdir(mode=0o700)
    write_private(Path(DEFAULT_DATA_DIR, "endpoints.json"), json.dumps({"redis_url": "redis://h", "pid": 7}))
    named = str(Path(DEFAULT_DATA_DIR).resolve())
    for folder in (DEFAULT_DATA_DIR, named):
        assert read_endpoints(folder) == {"redis_url": "redis://h", "pid": 7}
    os.chown(Path(named, "endpoints.json"), STRANGER, STRANGER)
    assert read_endpoints(named)["redis_url"] == store_url({"JOBWORKER_DATA_DIR": named}) == "redis://h"
    with pytest.raises(ConfigurationError, match="another user"):
        read_endpoints(DEFAULT_DATA_DIR)
    with pytest.raises(ConfigurationError, match="another user"):
        store_url({})
    result = CliRunner().invoke(
        main, ["stats"], env={"JOBWORKER_REDIS_URL": None, "JOBWORKER_DATA_DIR": None}
    )
    assert (result.exit_code, "another user" in result.output) == (Exit.USAGE, True)


@AS_ROOT
@pytest.mark.parametrize("name", ["data", "data/below"])
def test_another_user_is_told_who_may_read_the_addresses(open_to_all: Path, name: str) -> None:
    (open_to_all / "data").mkdir(mode=0o700)
    os.setresuid(STRANGER, STRANGER, 0)
    try:
        with pytest.raises(ConfigurationError, match="give --redis-url"):
            read_endpoints(str(open_to_all / name))
    finally:
        os.setresuid(0, 0, 0)


@AS_ROOT
@pytest.mark.parametrize("way", ["option", "environment", "file"])
def test_a_named_store_is_used_although_the_data_directory_cannot_be_read(
    open_to_all: Path, way: str
) -> None:
    url = "redis://127.0.0.1:1/0"
    config = open_to_all / "jobworker.toml"
    folder = open_to_all / "data"
    folder.mkdir(mode=0o700)
    config.write_text(f'redis-url = "{url}"\ndata-dir = "{folder}"\n')
    arguments = {"option": [f"--redis-url={url}"], "environment": [], "file": [f"--config={config}"]}[way]
    env = {"JOBWORKER_REDIS_URL": url if way == "environment" else None, "JOBWORKER_DATA_DIR": str(folder)}
    for verb in (["stats"], ["dlq", "list"]):
        # First as root, so that everything is imported: other users cannot read every Python installation.
        codes = [CliRunner().invoke(main, [*verb, *arguments], env=env).exit_code]
        os.setresuid(STRANGER, STRANGER, 0)
        try:
            codes.append(CliRunner().invoke(main, [*verb, *arguments], env=env).exit_code)
        finally:
            os.setresuid(0, 0, 0)
        assert codes == [Exit.STORE_UNREACHABLE, Exit.STORE_UNREACHABLE]


@pytest.mark.parametrize(
    ("text", "shown"), [("a b", '"a b"'), ('a"b\\c', r'"a\x22b\x5cc"'), ("小\n", '"小\\x0a"')]
)
def test_a_text_is_quoted_for_the_configuration_file(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_a_path_is_no_pattern_for_the_server() -> None:
    assert escaped_pattern("/a b/\\c") == "/a b/\\c"
    assert escaped_pattern("/a[x]*?\\") == r"/a\[x\]\*\?" + "\\\\"


@pytest.mark.parametrize("change", ["deleted", "renamed", "replaced", "emptied"])
def test_a_data_directory_that_is_gone_is_reported(folder: Path, change: str) -> None:
    data = DataDir(str(folder))
    stores = Stores(Settings(), data, [])
    assert stores.reasons() == []
    if change == "renamed":
        folder.rename(folder.with_name("moved"))
    else:
        (folder / "lock").unlink()
    if change in ("deleted", "replaced"):
        folder.rmdir()
    if change == "replaced":
        folder.mkdir(mode=0o700)
        (folder / "lock").touch()
    (reason,) = stores.reasons()
    assert str(folder) in reason
    data.close()
