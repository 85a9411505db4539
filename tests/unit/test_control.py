"""Control socket between supervisor and child: whole messages, descriptors, the exit of the other side."""

import os
import socket
from collections.abc import Iterator

import pytest

from jobworker.worker.ipc.control import (
    MAX_MESSAGE_BYTES,
    Attach,
    ControlSocket,
    Drain,
    ExitReclaimed,
    Message,
    Ready,
    Report,
    Retire,
    StartFailed,
    WorkerExited,
)
from jobworker.worker.telemetry.metrics import MetricsBuffer

MESSAGES: list[Message] = [
    Attach(0, 7),
    WorkerExited(1, 2, "SIGKILL", True, timed_out=True, details={"peak_rss_mib": 312, "stack": "…"}),
    ExitReclaimed(1, 2),
    Retire(0, 7),
    Drain(),
    Ready(),
    StartFailed("no model", 3),
    Report(
        [("z_novel_jobs_dead_total", ("audit", "poison"), 2)],
        [("z_novel_dlq_length", ("s",), 5.0)],
        [("z_novel_batch_jobs", (), [0, 1, 0], 2.0)],
        "store away",
    ),
    Report(),
]


@pytest.fixture
def ends() -> Iterator[tuple[ControlSocket, ControlSocket]]:
    ours, socket_of_theirs = ControlSocket.pair()
    theirs = ControlSocket(socket_of_theirs)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(
    ends: tuple[ControlSocket, ControlSocket], message: Message
) -> None:
    for sender, receiver in (ends, ends[::-1]):
        assert sender.send(message)
        assert receiver.receive() == (message, [])
        assert receiver.receive() is None


def test_messages_keep_their_order_and_their_borders(ends: tuple[ControlSocket, ControlSocket]) -> None:
    for message in MESSAGES:
        assert ends[0].send(message)
    received = [ends[1].receive() for _ in MESSAGES]
    assert received == [(message, []) for message in MESSAGES]


def test_a_report_without_news_is_not_sent(ends: tuple[ControlSocket, ControlSocket]) -> None:
    ours, theirs = ends
    metrics = MetricsBuffer()
    for trouble in (None, None, "store away", "store away", None):
        ours.report(metrics, trouble)
    ours.report(metrics, None, at_least_every_s=60.0)
    ours.report(metrics, None, at_least_every_s=0.0)
    metrics.count("z_novel_jobs_failed_total", ("t",))
    ours.report(metrics, None)
    received = [theirs.receive() for _ in range(6)]
    reports = [one[0] for one in received if one and isinstance(one[0], Report)]
    assert [one.trouble for one in reports] == [None, "store away", None, None, None]
    assert [len(one.counts) for one in reports] == [0, 0, 0, 0, 1]
    assert received[-1] is None


def test_a_long_message_arrives_whole(ends: tuple[ControlSocket, ControlSocket]) -> None:
    stack = "frame\n" * (MAX_MESSAGE_BYTES // 8)
    assert ends[0].send(WorkerExited(0, 0, "SIGSEGV", True, details={"stack": stack}))
    received = ends[1].receive()
    assert received is not None
    assert isinstance(received[0], WorkerExited)
    assert received[0].details["stack"] == stack


def test_descriptors_travel_with_their_message(ends: tuple[ControlSocket, ControlSocket]) -> None:
    pipes = [os.pipe() for _ in range(3)]
    assert ends[0].send(Attach(0, 1), [reading for reading, _ in pipes])
    assert ends[0].send(Drain())
    received = ends[1].receive()
    assert received is not None
    message, fds = received
    assert (message, len(fds)) == (Attach(0, 1), 3)
    for fd, (reading, writing) in zip(fds, pipes, strict=True):
        os.write(writing, b"%d" % writing)
        assert os.read(fd, 10) == b"%d" % writing, "the descriptors came in another order"
        assert not os.get_inheritable(fd)
        for each in (fd, reading, writing):
            os.close(each)
    assert ends[1].receive() == (Drain(), [])


def test_the_end_of_the_other_side_comes_after_its_last_message(
    ends: tuple[ControlSocket, ControlSocket],
) -> None:
    ours, theirs = ends
    assert theirs.send(StartFailed("no model", 3))
    theirs.close()
    assert ours.receive() == (StartFailed("no model", 3), [])
    for _ in range(2):
        with pytest.raises(EOFError):
            ours.receive()
    assert ours.send(Drain()) is False


def test_a_side_that_ended_with_messages_unread_is_an_end_too(
    ends: tuple[ControlSocket, ControlSocket],
) -> None:
    ours, theirs = ends
    assert ours.send(Drain())
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()


def test_a_full_line_says_no_and_goes_on_later(ends: tuple[ControlSocket, ControlSocket]) -> None:
    """A child that does not listen must never hold the supervisor up."""
    ours, theirs = ends
    big = StartFailed("x" * 50_000, 3)
    sent = 0
    while ours.send(big):
        sent += 1
        assert sent < 10_000
    assert sent > 1
    assert ours.send(big) is False
    received = 0
    while theirs.receive():
        received += 1
    assert received == sent, "what was refused was sent all the same"
    assert ours.send(big)


def test_the_childs_end_goes_over_a_descriptor() -> None:
    """As a child makes it of the number in its arguments."""
    ours, theirs = ControlSocket.pair()
    again = ControlSocket(socket.socket(fileno=theirs.detach()))
    assert again.send(Ready())
    assert ours.receive() == (Ready(), [])
    ours.close()
    again.close()
