"""Attribution of a write error: to the store, whose outage pauses a job type, or to one job."""

from .ports import SuspectStoreError, VectorStore, VectorStoreError, WriteRefused
from .schema import DEFAULT_COLLECTION


class Attribution:
    """Decides whether the store or a job is at fault; for the jobs of one call of a handler.

    The evidence is a read and a write of the default collection, which every service has. A fault of one
    tenant's collection or rows must not stop the jobs of the others.
    """

    def __init__(self, store: VectorStore) -> None:
        self._store = store
        self._store_works = False

    def attribute(self, error: SuspectStoreError) -> VectorStoreError:
        """`error` if the store is in trouble, else WriteRefused, which fails one job and pauses no type."""
        if not self._store_works:
            try:
                self._store.check_writable(DEFAULT_COLLECTION)
            except VectorStoreError:
                return error
            self._store_works = True
        return WriteRefused(f"{error} (the store carries out other writes)")
