"""The file of bearer tokens: its lines, its mode, and messages that show no token."""

from pathlib import Path

import pytest

from jobworker.handlers.api.client import SearchClient, SearchRefused, read_serve_token
from jobworker.worker.errors import ConfigurationError
from jobworker.worker.http.bearer_tokens import read_tokens

TOKEN = "a-token-long-enough"


def written(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_lines_are_tokens_with_or_without_a_tenant_and_project(tmp_path: Path) -> None:
    text = f"# a comment\n\n{TOKEN}\n  t.1:a_b-c\t{TOKEN}-2  \nt1/p:1 {TOKEN}-4"
    tokens = read_tokens(written(tmp_path, text))
    assert tokens.holder(f"Bearer {TOKEN}") == ("", "")
    assert tokens.holder(f"bearer  {TOKEN}-2 ") == ("t.1:a_b-c", "")
    assert tokens.holder(f"Bearer {TOKEN}-4") == ("t1", "p:1")
    for header in ("", "Bearer", f"Bearer {TOKEN}-3", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN} x"):
        assert tokens.holder(header) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment\n",
        "short\n",
        f"a b {TOKEN}",
        f"t/e/n {TOKEN}",
        f"/p1 {TOKEN}",
        f"t1/ {TOKEN}",
        f"t1/p1 {TOKEN}\nt1 {TOKEN}",
        f"t1 {TOKEN}\nt2 {TOKEN}",
        "ü" * 20,
    ],
)
def test_a_wrong_line_is_named_without_the_token(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        read_tokens(written(tmp_path, text))
    assert TOKEN not in str(raised.value)
    assert "short" not in str(raised.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o666, 0o602])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigurationError, match="chmod 600"):
        read_tokens(written(tmp_path, TOKEN, mode))


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o440])
def test_a_group_may_read_it(tmp_path: Path, mode: int) -> None:
    assert read_tokens(written(tmp_path, TOKEN, mode)).holder(f"Bearer {TOKEN}")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigurationError):
            read_tokens(str(path))


def test_the_token_of_a_client_is_checked_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_serve_token(written(tmp_path, f" {TOKEN}\n")) == TOKEN
    for text in ("", "tök", f"t1 {TOKEN}", f"# of the service\n{TOKEN}\n", f"{TOKEN}\0"):
        with pytest.raises(ConfigurationError, match="token") as refused:
            read_serve_token(written(tmp_path, text))
        assert not text or text not in str(refused.value)
        assert TOKEN not in str(refused.value)
    monkeypatch.setenv("JOBWORKER_SERVE_TOKEN", f"{TOKEN}\n{TOKEN}")
    with pytest.raises(ConfigurationError, match="JOBWORKER_SERVE_TOKEN"):
        read_serve_token("")


def test_a_question_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(SearchRefused, match="UTF-8"):
        SearchClient("http://127.0.0.1:1").search({"query": "\udcff"})
