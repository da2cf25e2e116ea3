"""Documents kept apart: a library of collections for each tenant."""

from __future__ import annotations

import threading

from gateway.access.caller import current_tenant
from miaotui.retrieval.library import Library, Store


class TenantLibraries:
    """Thread-safe. The libraries of a store, each opened when it is first asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._libraries: dict[str, Library] = {}

    def current(self) -> Library:
        """The library of the current request's tenant; ask in the request's own task."""
        return self._library(current_tenant())

    def every(self) -> list[Library]:
        """All libraries that there are. Raises `StoreError`."""
        return [self._library(tenant) for tenant in ("", *self.store.tenants())]

    def close(self) -> None:
        """Closes all collections, and the store."""
        with self._lock:
            for library in self._libraries.values():
                library.close()
            self._libraries.clear()
        self.store.close()

    def _library(self, tenant: str) -> Library:
        with self._lock:
            known = self._libraries.get(tenant)
            if known is None:
                known = self._libraries[tenant] = self.store.library(tenant)
            return known
