"""HTTP API: time of a question on an idle service and beside a full queue, and what the queue loses.

Parts: ``idle`` asks one question after another. ``clients`` lets several clients ask at once, with
``--peer URL`` also of another server with OpenAI's form, in turns. ``bulk`` asks at a fixed rate while jobs
with chapters wait, and measures the share of the processor time that the questions take from the jobs.
``kills`` kills the role, on the idle service and beside the full queue, and measures the time to the next
vector.
"""

import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import options
import orjson
from embed_service import EMBED, Running, running
from embed_texts import chapters, jobs, take_segments
from hosts import cpu_s, format_facts, machine_facts, roles_of, table
from latency import percentiles
from rig import LIMIT_S, free_port, say

from jobworker.handlers.encoder.find_model import default_model
from jobworker.worker.safe_text import safe_json

#: 32 tokens for most tokenizers, special tokens included; a number makes each question another one.
_QUESTION = (
    "{} Who kept the lamp burning when the harbour froze, and what did the keeper of the petrel say to "
    "the men?"
)
#: Embedded before anything is measured: caches of shapes, and connections.
_WARM = 30
#: Window of the comparison with and without questions. Workers report twice a second.
_WINDOW_S = 8.0
_POLL_S = 0.01
#: Longer than the time after which a role counts as healthy.
_BETWEEN_KILLS_S = 7.0

Report = dict[str, Any]


class Asker:
    """One client with a connection of its own, which is kept open."""

    def __init__(self, url: str, model: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._path, self._model = f"{parts.path.rstrip('/')}/embeddings", model
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, number: int) -> float:
        """Ask one question; returns the seconds until its vector came. Raises RuntimeError if not 200."""
        body = orjson.dumps({"model": self._model, "input": [_QUESTION.format(number)]})
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        data = head.encode() + body
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        began = time.perf_counter()
        writer.write(data)
        header = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(header.partition(b"content-length:")[2].partition(b"\r")[0])
        answer = await reader.readexactly(length)
        took_s = time.perf_counter() - began
        if not header.startswith(b"http/1.1 200"):
            raise RuntimeError(answer.decode(errors="replace")[:500])
        return took_s

    def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()


async def one_by_one(url: str, model: str, count: int) -> list[float]:
    """Seconds of each of ``count`` questions, one after another."""
    asker = Asker(url, model)
    for number in range(_WARM):
        await asker.ask(number)
    found = [await asker.ask(_WARM + number) for number in range(count)]
    asker.close()
    return found


async def at_rate(url: str, model: str, rate: float, seconds: float) -> list[float]:
    """Seconds of each question, asked at a fixed rate; a question that is late delays no other."""
    askers = [Asker(url, model) for _ in range(8)]
    tasks = []
    due_s = time.monotonic()
    for number in range(max(1, round(rate * seconds))):
        due_s += 1 / rate
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))  # the interval is intended
        tasks.append(asyncio.create_task(askers[number % len(askers)].ask(number)))
    found = await asyncio.gather(*tasks)
    for asker in askers:
        asker.close()
    return list(found)


async def at_once(url: str, model: str, clients: int, seconds: float) -> float:
    """Questions a second of several clients, each with one question at a time."""
    askers = [Asker(url, model) for _ in range(clients)]
    for asker in askers:
        await asker.ask(0)
    answered, until_s = 0, time.perf_counter() + seconds

    async def repeat(asker: Asker, first: int) -> None:
        nonlocal answered
        number = first
        while time.perf_counter() < until_s:
            await asker.ask(number)
            number += clients
            answered += 1

    await asyncio.gather(*(repeat(asker, number) for number, asker in enumerate(askers)))
    for asker in askers:
        asker.close()
    return answered / seconds


@contextmanager
def serving(texts: Sequence[str], procs: int, model: str) -> Iterator[tuple[str, Running]]:
    """A ready service with a backlog that is not released yet, and the address of its API."""
    port = free_port()
    with running(jobs(texts), procs, model, EMBED, JOBWORKER_SERVE_ADDR=f"127.0.0.1:{port}") as served:
        yield f"http://127.0.0.1:{port}/v1", served


def bulk(
    url: str, served: Running, count: int, *, rate: float, rounds: int, window_s: float
) -> tuple[list[float], Report]:
    """Seconds of questions beside a full queue, and its tokens a second with and without them."""
    served.backlog.release(count)
    asyncio.run(at_rate(url, "", rate, 2.0))  # every worker has its first batch
    roles = roles_of(served.supervisor_pid)
    took_s: list[float] = []
    tokens_per_s: dict[str, list[float]] = {"alone": [], "beside questions": []}
    shares = []
    for turn in range(2 * rounds):
        name = "beside questions" if turn % 2 else "alone"
        tokens, began = _tokens(served), time.perf_counter()
        before = [cpu_s(roles["api"]), cpu_s(roles["worker"])]
        if turn % 2:
            took_s += asyncio.run(at_rate(url, "", rate, window_s))
        else:
            time.sleep(window_s)  # the window is intended
        api_s, worker_s = cpu_s(roles["api"]) - before[0], cpu_s(roles["worker"]) - before[1]
        asked = round(rate * window_s) * 32 if turn % 2 else 0
        speed = (_tokens(served) - tokens - asked) / (time.perf_counter() - began)
        if served.backlog.drained:
            raise RuntimeError("the queue is empty: give more --count")
        tokens_per_s[name].append(speed)
        if turn % 2:
            shares.append(api_s / (api_s + worker_s))
        say(f"{turn + 1}/{2 * rounds} {name}: {speed:,.0f} tokens/s, api {api_s:.2f}, jobs {worker_s:.2f} s")
    medians = {name: statistics.median(found) for name, found in tokens_per_s.items()}
    # Counters of the queue grow a batch of seconds at a time; processor time is exact to a hundredth.
    return took_s, {"tokens_per_s": medians, "api_cpu_share": statistics.median(shares)}


def mended(url: str, served: Running, kills: int) -> list[float]:
    """Seconds from each ``kill -9`` of the role to the next vector."""
    found = []
    for number in range(kills):
        if number:
            time.sleep(_BETWEEN_KILLS_S)  # a role that ends again soon is started later
        (pid,) = roles_of(served.supervisor_pid)["api"]
        os.kill(pid, signal.SIGKILL)
        found.append(asyncio.run(_next_vector(url)))
        say(f"kill {number + 1}/{kills}: {found[-1]:.2f} s")
    return found


async def _next_vector(url: str) -> float:
    began = time.perf_counter()
    while time.perf_counter() - began < LIMIT_S:
        asker = Asker(url, "")
        try:
            await asker.ask(0)
            return time.perf_counter() - began
        except (OSError, EOFError, RuntimeError):
            # A connection of the killed process, or the model is being loaded.
            await asyncio.sleep(_POLL_S)
        finally:
            asker.close()
    raise RuntimeError(f"no vector within {LIMIT_S:g} s after a kill")


def _tokens(served: Running) -> float:
    return served.metric("z_novel_embedded_tokens_total")


def clients_in_turns(urls: dict[str, tuple[str, str]], clients: int, rounds: int, seconds: float) -> Report:
    """Questions a second of each server, the medians of its turns; ``urls``: name -> URL and model name."""
    found: dict[str, list[float]] = {name: [] for name in urls}
    for turn in range(rounds):
        for name, (url, model) in urls.items():
            found[name].append(asyncio.run(at_once(url, model, clients, seconds)))
            say(f"clients {turn + 1}/{rounds} {name}: {found[name][-1]:.0f} questions/s")
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def measure(
    file: Path | None, count: int, procs: int, model: str, *, questions: int, rate: float, rounds: int,
    window_s: float, clients: int, kills: int, peer: tuple[str, str] | None,
) -> Report:  # fmt: skip
    """Measure all parts with one service."""
    texts = take_segments(chapters(file), count)
    report: Report = {"bench": "serve", "host": machine_facts(), "procs": procs, "rounds": rounds}
    with serving(texts, procs, model) as (url, served):
        ms: dict[str, list[float]] = {"idle": asyncio.run(one_by_one(url, "", questions))}
        say("idle: done")
        mended_s = {"idle": mended(url, served, kills)}
        urls = {"jobworker": (url, "")} | ({"peer": peer} if peer else {})
        report["questions_per_s"] = clients_in_turns(urls, clients, rounds, window_s)
        ms["beside a full queue"], report["bulk"] = bulk(
            url, served, len(jobs(texts)), rate=rate, rounds=rounds, window_s=window_s
        )
        mended_s["beside a full queue"] = mended(url, served, kills)
        if served.backlog.drained:
            raise RuntimeError("the queue is empty: give more --count")
    report["mended_s"] = mended_s
    report["ms"] = {name: percentiles(sorted(one * 1000 for one in found)) for name, found in ms.items()}
    report |= {"rate": rate, "questions": questions, "clients": clients}
    return report


def format_report(report: Report) -> str:
    """The tables of times and speeds."""
    names = list(next(iter(report["ms"].values())))
    rows = [("ms, one question of 32 tokens", *names)]
    rows += [(name, *(f"{ms[one]:.1f}" for one in names)) for name, ms in report["ms"].items()]
    speed, share = report["bulk"]["tokens_per_s"], report["bulk"]["api_cpu_share"]
    lines = [format_facts(report["host"]), table(rows)]
    lines.append(
        f"queue: {speed['alone']:,.0f} tokens/s alone, {speed['beside questions']:,.0f} beside "
        f"{report['rate']:g} questions/s, which take {share:.1%} of the processor time; "
        f"{report['procs']} workers"
    )
    lines += [
        f"{report['clients']} clients at once: {name} {value:,.0f} questions/s"
        for name, value in report["questions_per_s"].items()
    ]
    lines += [
        f"from kill -9 of the role to the next vector, {len(found)} kills, {name}: "
        f"{min(found):.2f} to {max(found):.2f} s"
        for name, found in report["mended_s"].items()
        if found
    ]
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@options.texts
@click.option(
    "--count",
    type=click.IntRange(1),
    default=50_000,
    show_default=True,
    help="Segments in the queue; it must not run empty.",
)
@options.model
@options.worker_a_core
@click.option("--questions", type=click.IntRange(1), default=500, show_default=True, help="Of the idle part.")
@click.option(
    "--rate",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    help="Questions a second beside the queue.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Turns of each with and without questions, and of each server.",
)
@click.option(
    "--window",
    "window_s",
    type=click.FloatRange(0.5, LIMIT_S),
    default=_WINDOW_S,
    show_default=True,
    help="Seconds of one turn.",
)
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True, help="Clients at once.")
@click.option(
    "--kills",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Kills of the role, idle and beside the queue each.",
)
@click.option("--peer", help="Another server for the clients, http://host:port/v1.")
@click.option("--peer-model", default="", help="The model's name there.")
@options.as_json
def main(
    file: Path | None, count: int, model: str, procs: int, questions: int, rate: float, rounds: int,
    window_s: float, clients: int, kills: int, peer: str | None, peer_model: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure and print."""
    report = measure(
        file, count, procs, model or default_model(), questions=questions, rate=rate, rounds=rounds,
        window_s=window_s, clients=clients, kills=kills, peer=(peer, peer_model) if peer else None,
    )  # fmt: skip
    print(safe_json(report) if as_json else format_report(report))


if __name__ == "__main__":
    sys.exit(main())
