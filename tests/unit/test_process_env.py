"""Start of a process with closed standard streams, and with a proxy in its environment."""

import os
import subprocess
import sys

import pytest

from jobworker.worker.host.process_env import exempt_loopback_from_proxies

#: Opens a file after `open_standard_streams` and tells its number, and whether the streams can be written.
PROGRAM = """
import os, sys
from jobworker.worker.host.process_env import open_standard_streams
open_standard_streams()
fd = os.open(os.devnull, os.O_RDONLY)
print("out"); print("err", file=sys.stderr); sys.stderr.isatty(); sys.stdin and sys.stdin.read()
os.write(int(sys.argv[1]), f"{fd} {os.get_inheritable(2)}".encode())
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_standard_stream(closed: str) -> None:
    read_fd, write_fd = os.pipe()
    command = f'exec "$0" -c "$1" {write_fd} {closed}'
    try:
        subprocess.run(
            ["sh", "-c", command, sys.executable, PROGRAM], pass_fds=[write_fd], check=True, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        number, inheritable = os.read(read_fd, 100).decode().split()
    finally:
        os.close(read_fd)
        os.close(write_fd)
    assert int(number) > 2
    assert inheritable == "True"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"https_proxy": "http://p:1"}, {"no_proxy": "localhost,127.0.0.1,::1"}),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a"},
         {"no_proxy": "a,localhost,127.0.0.1,::1", "NO_PROXY": "a,localhost,127.0.0.1,::1"}),
        ({"http_proxy": "http://p:1", "no_proxy": " a, 127.0.0.1 "},
         {"no_proxy": "a,127.0.0.1,localhost,::1"}),
        ({"grpc_proxy": "http://p:1", "no_grpc_proxy": "b"},
         {"no_proxy": "localhost,127.0.0.1,::1", "no_grpc_proxy": "b,localhost,127.0.0.1,::1"}),
        ({"NO_PROXY": "a"}, {}),
        ({"https_proxy": ""}, {}),
    ],
)  # fmt: skip
def test_this_machine_is_reached_without_a_proxy(before: dict[str, str], after: dict[str, str]) -> None:
    environ = dict(before)
    exempt_loopback_from_proxies(environ)
    assert environ == {**before, **after}
    again = dict(environ)
    exempt_loopback_from_proxies(again)
    assert again == environ
