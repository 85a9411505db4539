"""Classification of errors of Milvus and its client: retry, repair or give up (pure)."""

from collections.abc import Collection
from enum import Enum

from ..ports import (
    CollectionMissing,
    CollectionUnavailable,
    PermanentStoreError,
    SuspectStoreError,
    TransientStoreError,
    VectorStoreError,
)


class Verdict(Enum):
    """Remedy for an error."""

    TRANSIENT = "the same call may succeed later"
    REFUSED = "the server refuses the credentials: the operator must act, and no job is at fault"
    PERMANENT = "the same call can never succeed"
    SUSPECT = "an outage, or a fault of the call: the code does not tell"
    NOT_LOADED = "load the collection, then retry"
    NO_COLLECTION = "the collection or alias does not exist"


T, P, R = Verdict.TRANSIENT, Verdict.PERMANENT, Verdict.REFUSED

# The client's own errors all have code 1, so they are classified by class.
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

# Error codes of the server (Milvus 2.3 to 2.6 and Milvus Lite 3.2) and of the client.
CODES = {
    1: T,  # 2.4 and later: a part of the server is not ready; see LITE_CODES for Lite
    2: T,  # the client cannot connect
    3: T,  # service overloaded
    4: T,  # memory limit reached
    6: P,  # Lite: wrong dimension, filter or value
    8: T,  # rate limit
    9: T,  # writes rejected temporarily (memory or disk quota)
    11: T,  # Lite: index not created yet
    12: T,  # disk quota
    35: P,  # Lite: index exists with other parameters
    100: Verdict.NO_COLLECTION,
    101: Verdict.NOT_LOADED,
    103: Verdict.NOT_LOADED,  # not fully loaded
    106: Verdict.NOT_LOADED,  # on recovering
    200: P,  # partition not found
    202: T,  # partition not fully loaded
    700: P,  # no index
    1100: P,  # invalid parameter
    1101: P,  # missing parameter
    1102: P,  # parameter too large
    1400: R,  # no permission
    1401: R,  # not authenticated
    10001: T,  # an operation was cancelled by the server
    **dict.fromkeys(range(901, 907), T),  # nodes of the server join or leave
    # 2.3: bad filter, wrong dimension, limits; 2.4 and later: anything unexpected.
    65535: Verdict.SUSPECT,
}

# Timeouts of the client, which have code 1.
TIMEOUT_TEXTS = ("Retry timeout", "Retry run out")

# Too many partitions or shards; 2.3 uses a generic code for it.
LIMIT_TEXT = "exceeds max configuration"

# Lite uses code 1 for anything unexpected. For a full disk or a damaged file, the message has an errno.
LITE_CODES = {1: P}

REFUSING_STATUSES = ("PERMISSION_DENIED", "UNAUTHENTICATED")
STATUSES = {
    "UNAVAILABLE": T,
    "DEADLINE_EXCEEDED": T,
    "CANCELLED": T,
    "INVALID_ARGUMENT": P,
    **dict.fromkeys(REFUSING_STATUSES, R),
    "UNIMPLEMENTED": P,
}


def classify(class_names: Collection[str], code: int | str, message: str, *, lite: bool = False) -> Verdict:
    """Classify an error.

    `class_names`: names of its class and its bases; `code`: the server's code or the name of a gRPC status;
    `lite`: whether the server is Milvus Lite.
    """
    if any(text in message for text in TIMEOUT_TEXTS):
        return T
    if LIMIT_TEXT in message:
        return P
    for name in class_names:
        if name in CLASSES:
            return CLASSES[name]
    if isinstance(code, str):
        return classify_status(code, message)
    if lite and code in LITE_CODES and "[Errno" not in message:
        return LITE_CODES[code]
    return CODES.get(code, Verdict.SUSPECT)


def classify_status(status: str, message: str) -> Verdict:
    """Classify a gRPC status. A message over the size limit is permanent: it is as large in every retry."""
    if status == "RESOURCE_EXHAUSTED":
        return P if "larger than max" in message else T
    return STATUSES.get(status, T)


class CredentialsRefused(TransientStoreError):
    """The server refuses the token, or its user lacks a right; no job is at fault."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}: check --milvus-token and the rights of its user; restart the service")


class NotLoaded(CollectionUnavailable):
    """The collection is not loaded; a server reports this for a while after a restart, too."""


class NoCollection(CollectionMissing):
    """The collection or alias does not exist."""


ERROR_CLASSES: dict[Verdict, type[VectorStoreError]] = {
    Verdict.TRANSIENT: TransientStoreError,
    Verdict.REFUSED: CredentialsRefused,
    Verdict.PERMANENT: PermanentStoreError,
    Verdict.SUSPECT: SuspectStoreError,
    Verdict.NOT_LOADED: NotLoaded,
    Verdict.NO_COLLECTION: NoCollection,
}
