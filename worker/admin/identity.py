"""Id, type, tenant and counters of a job, read from its bytes as far as they are valid."""

import msgspec

from ..envelope import LAST_ERROR_FIELD


class _Names(msgspec.Struct):
    id: str = ""
    type: str = ""
    tenant_id: str = ""
    project_id: str = ""


class JobIdentity(_Names):
    """What names a job, and how often it was tried. The rest of the job may be invalid."""

    retry_count: int = 0
    deaths: int = 0
    #: Error of the last try, for a job that is tried again.
    last_error: str = msgspec.field(default="", name=LAST_ERROR_FIELD)

    @property
    def is_delayed(self) -> bool:
        """For a job in the retry set: whether it waits for its first try, not for another one."""
        return not (self.retry_count or self.deaths or self.last_error)


_identity = msgspec.json.Decoder(JobIdentity)
_names = msgspec.json.Decoder(_Names)


def read_identity(data: bytes | None) -> JobIdentity:
    """The identity in a job's JSON. Fields are empty where the data is not a job; it never raises.

    Invalid counters do not hide the names: a dead letter with such a job can still be found and requeued.
    """
    try:
        return _identity.decode(data or b"")
    except (ValueError, RecursionError):
        pass
    try:
        return JobIdentity(**msgspec.structs.asdict(_names.decode(data or b"")))
    except (ValueError, RecursionError):
        return JobIdentity()
