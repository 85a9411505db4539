"""Sort what Milvus and its client raise into what helps: a retry, a repair or nothing (pure)."""

from collections.abc import Collection
from enum import Enum

from ..ports import PermanentStoreError, TransientStoreError, VectorStoreError


class Verdict(Enum):
    """What to do about an error."""

    TRANSIENT = "the same call may work later"
    PERMANENT = "the same call can never work"
    NOT_LOADED = "load the collection, then once more"
    NO_COLLECTION = "the collection or alias is not there"


T, P = Verdict.TRANSIENT, Verdict.PERMANENT

# The client's own complaints all carry code 1, so they are known by class.
CLASSES = {
    "ConnectionConfigException": P,
    "DataNotMatchException": P,
    "DataTypeNotMatchException": P,
    "DataTypeNotSupportException": P,
    "FieldTypeException": P,
    "FieldsTypeException": P,
    "InvalidConsistencyLevel": P,
    "ParamError": P,
    "PartitionKeyException": P,
    "PrimaryKeyException": P,
    "SchemaNotReadyException": P,
    "ServerVersionIncompatibleException": P,
    "ConnectionNotExistException": T,
    "MilvusUnavailableException": T,
    "SchemaMismatchRetryableException": T,
}

# Codes of the server (Milvus 2.3 to 2.6 and Milvus Lite 3.2) and of the client.
CODES = {
    1: T,  # 2.4 and later: a part of the server is not ready; see LITE_CODES for Lite
    2: T,  # the client cannot connect
    3: T,  # service overloaded
    4: T,  # memory limit reached
    6: P,  # Lite: wrong dimension, filter or value
    8: T,  # rate limit
    9: T,  # writes refused for now (memory or disk quota)
    11: T,  # Lite: index not there yet
    12: T,  # disk quota
    35: P,  # Lite: index exists with other parameters
    100: Verdict.NO_COLLECTION,
    101: Verdict.NOT_LOADED,
    103: T,  # collection not fully loaded
    106: T,  # collection on recovering
    200: P,  # partition not found
    202: T,  # partition not fully loaded
    700: P,  # no index
    1100: P,  # invalid parameter
    1101: P,  # missing parameter
    1102: P,  # parameter too large
    1400: P,  # no permission
    1401: P,  # not authenticated
    10001: T,  # an operation was cancelled by the server
    **dict.fromkeys(range(901, 907), T),  # the server's nodes are coming or going
    # 2.3: bad filter, wrong dimension, limits; 2.4 and later: anything unexpected. A few tries cost little.
    65535: T,
}

# The client gave up waiting; it says so under code 1.
GAVE_UP = ("Retry timeout", "Retry run out")

# Too many partitions or shards: 2.3 says it under a number that it has for everything.
TOO_MANY = "exceeds max configuration"

# Lite answers 1 for anything it did not expect; a full disk or a broken file names its errno.
LITE_CODES = {1: P}

STATUSES = {
    "UNAVAILABLE": T,
    "DEADLINE_EXCEEDED": T,
    "CANCELLED": T,
    "INVALID_ARGUMENT": P,
    "PERMISSION_DENIED": P,
    "UNAUTHENTICATED": P,
    "UNIMPLEMENTED": P,
}


def classify(class_names: Collection[str], code: int | str, message: str, *, lite: bool = False) -> Verdict:
    """Return the verdict on an error.

    `class_names`: names of its class and the bases; `code`: the server's number or the name of a gRPC status;
    `lite`: whether Milvus Lite answered. An unknown code is transient: a job's own tries are bounded.
    """
    if any(mark in message for mark in GAVE_UP):
        return T
    if TOO_MANY in message:
        return P
    for name in class_names:
        if name in CLASSES:
            return CLASSES[name]
    if isinstance(code, str):
        return of_status(code, message)
    if lite and code in LITE_CODES and "[Errno" not in message:
        return LITE_CODES[code]
    return CODES.get(code, T)


def of_status(status: str, message: str) -> Verdict:
    """Return the verdict on a gRPC status; a message over the limit stays so however often it is sent."""
    if status == "RESOURCE_EXHAUSTED":
        return P if "larger than max" in message else T
    return STATUSES.get(status, T)


class NotLoaded(TransientStoreError):
    """The collection is not loaded: a server that restarts says so for a while, too."""


class NoCollection(PermanentStoreError):
    """The collection or alias is not there."""


RAISED: dict[Verdict, type[VectorStoreError]] = {
    Verdict.TRANSIENT: TransientStoreError,
    Verdict.PERMANENT: PermanentStoreError,
    Verdict.NOT_LOADED: NotLoaded,
    Verdict.NO_COLLECTION: NoCollection,
}
