"""TCP proxy in this process that can reset, stall, swallow or delay traffic."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

_CHUNK_BYTES = 64 * 1024
#: Timeout of a call into the proxy's thread, which takes microseconds.
_CALL_WITHIN_S = 5.0


class _Pair:
    """Connection of a client, and its connection to the server."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.swallowed = False


class Proxy:
    """Proxy on a port of its own, until `close`; its methods may be called from any thread."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._delay_s = 0.0
        self._swallowing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._listener = self._do(self._listen())
        self.port = int(self._listener.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Reset every connection."""
        self._do(self._cut())

    def stall(self, on: bool) -> None:
        """Hold all data back, or release it in order."""
        self._loop.call_soon_threadsafe(self._flowing.clear if on else self._flowing.set)

    def swallow(self, on: bool) -> None:
        """Discard all data of existing connections for good, and of those opened meanwhile."""
        self._do(self._swallow(on))

    def delay(self, seconds: float) -> None:
        """Delay every chunk in both directions."""
        self._delay_s = seconds

    def close(self) -> None:
        """Stop listening and reset all connections."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_WITHIN_S)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_WITHIN_S)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair()
        pair.swallowed = self._swallowing
        pair.writers = [writer, there[1]]
        self._pairs.add(pair)
        for pump in (self._pump(reader, there[1], pair), self._pump(there[0], writer, pair)):
            task = asyncio.ensure_future(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await self._flowing.wait()
                if not pair.swallowed:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass  # the end of the other side is handled in the same way
        if not pair.swallowed:  # a network that loses all data also loses the FIN
            self._drop(pair)

    def _drop(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        for writer in pair.writers:
            writer.transport.abort()

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            self._drop(pair)

    async def _swallow(self, on: bool) -> None:
        self._swallowing = on
        for pair in self._pairs:
            pair.swallowed = pair.swallowed or on

    async def _close(self) -> None:
        self._listener.close()
        await self._cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
