"""A TCP balancer as stands in front of several processes: each connection goes to the next one that accepts it."""

import asyncio
import contextlib
import threading


class Balancer:
    """
    Listens on `url` from `__enter__` to `__exit__` and passes connections on to `backends`, in turn.

    `backends` is a list of ports of this machine, which may be changed at any time. A connection that none of them
    accepts is closed without a byte.
    """

    def __init__(self, *backends):
        self.backends = list(backends)
        self.url = None
        self._turn = 0
        self._writers = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="balancer", daemon=True)

    def __enter__(self):
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *exc_info):
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _stop(self):
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    async def _serve(self, reader, writer):
        with contextlib.closing(writer):
            backend = await self._connect()
            if backend is not None:
                self._writers.add(writer)
                await asyncio.gather(pipe(reader, backend[1]), pipe(backend[0], writer))
                self._writers.discard(writer)

    async def _connect(self):
        ports = list(self.backends)
        self._turn += 1
        for number in range(len(ports)):
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", ports[(self._turn + number) % len(ports)])
        return None


async def pipe(reader, writer):
    """Pass on what comes, and then the end, which the other side answers with its own."""
    with contextlib.closing(writer), contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
