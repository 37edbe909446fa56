"""A service with nothing but the kernel's API: real store, operations, events, sockets, in a thread with its own loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mullion.base.paths import HostPaths
from mullion.parent.api import ApiServer, Authority, Route, create_app, load_token
from mullion.parent.events import Events
from mullion.parent.operations import Operations
from mullion.parent.store import SqliteStore, Store

T = TypeVar("T")


class ApiService:
    """`with ApiService(folder) as service:`; `call` runs a coroutine in the service's loop."""

    def __init__(
        self,
        folder: Path,
        routes: Sequence[Route] = (),
        services: dict[str, object] | None = None,
        listen: str = "127.0.0.1:0",
    ) -> None:
        self.paths = HostPaths(str(folder), str(folder))
        self._routes = routes
        self._services = services
        self._listen = listen
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="service")

    def call(self, make: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await make()

        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(run(), self._loop)
        return future.result(60)

    def __enter__(self) -> ApiService:
        self._thread.start()
        try:
            self.call(self._start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self.call(self._stop)
        finally:
            self._end()

    async def _start(self) -> None:
        self.store: Store = await SqliteStore.open(self.paths.database)
        self.events = Events(self.store)
        await self.events.open()
        self.operations = Operations(self.store, self.events)
        await self.operations.open()
        self.token = load_token(self.paths.token_file)
        closing = asyncio.Event()
        app = create_app(
            store=self.store,
            operations=self.operations,
            events=self.events,
            authority=Authority(self.token),
            closing=closing,
            routes=self._routes,
            services=self._services,
        )
        self.server = ApiServer(app, self.paths, self._listen, closing)
        await self.server.start()

    async def _stop(self) -> None:
        await self.server.stop()
        await self.operations.close(0.1)
        await self.events.close()
        await self.store.close()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
