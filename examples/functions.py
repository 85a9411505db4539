"""Functions as handlers: the payload is validated before the function runs.

cd examples
jobworker-supervise --no-builtin-handlers --app functions --reload
jobworker enqueue welcome --payload '{"name": "Ada"}'
jobworker enqueue welcome --payload '{"nom": "Ada"}'     # dead-lettered as malformed
"""

import asyncio
import dataclasses
import logging

import msgspec

from jobworker.worker import Job, PermanentError, job

log = logging.getLogger("examples.functions")


class Person(msgspec.Struct):
    """Payload of ``welcome`` and ``invite``."""

    name: str
    languages: list[str] = []


@dataclasses.dataclass
class Purchase:
    """Payload of ``total``."""

    item: str
    cents: int


@job("welcome", timeout=10)
def welcome(payload: Person) -> None:
    """Log a greeting. Delivery is at least once: a second run logs the same line again."""
    log.info("welcome", extra={"text": f"Welcome, {payload.name}!"})


@job("invite", timeout=30)
async def invite(payload: Person, job: Job) -> None:
    """Invite a person in every language at once."""

    async def send(language: str) -> None:
        await asyncio.sleep(0.01)  # a request to a server, for instance
        log.info("invited", extra={"text": payload.name, "language": language, "request": job.id})

    await asyncio.gather(*(send(language) for language in payload.languages))


@job("total", max_batch=50)
def total(payloads: list[Purchase]) -> list[BaseException | None]:
    """Add up several purchases in one call; one outcome per job, in order."""
    log.info("total", extra={"cents": sum(one.cents for one in payloads if one.cents >= 0)})
    return [PermanentError("a negative price") if one.cents < 0 else None for one in payloads]
