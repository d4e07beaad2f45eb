"""What every request passes before and after its route: key, queue, size and time of its body, counts.

Plain ASGI: a middleware that wraps requests in tasks would hide that a client has left.
"""

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openbagel.inference.scheduler import Scheduler
from openbagel.serve.errors import answer
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Service

LINGER_SECONDS = 2.0
"""How long the rest of a refused body is read and thrown away, so that the client gets to read why."""
TURN = 8
"""Posts looked at in one turn of the event loop, so that /health goes in between those of a crowd."""
JOBS = ("accepted", "refused", "done", "failed", "cancelled", "late", "packs", "forwards")


class Meters:
    """What `/metrics` shows of a scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("openbagel_waiting", "requests in the queue", self.scheduler.num_waiting)
        yield GaugeMetricFamily("openbagel_running", "requests on the model", len(self.scheduler.running))
        for name in JOBS:
            yield CounterMetricFamily(f"openbagel_{name}", "by the scheduler", self.scheduler.counts[name])


class Guard:
    """Wraps an app. keys: those of clients, none lets everybody in; open_paths need none."""

    def __init__(
        self, app: ASGIApp, service: Service, keys: Collection[str], open_paths: Collection[str]
    ) -> None:
        self.app, self.service, self.open_paths = app, service, open_paths
        self.keys = [key.encode() for key in keys]
        self.open: Counter[str] = Counter()
        """Posts of each key on their way through the server."""
        self.turns = asyncio.Semaphore(TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = Exchange(receive, send, Headers(scope=scope), self.service.limits)
        started, taken = time.monotonic(), Counter[str]()
        seconds: Histogram = scope["app"].state.seconds  # asked now: a mounted app puts itself in its place
        try:
            key = scope.setdefault("state", {})["key"] = self._key(scope)
            if scope["method"] == "POST" and scope["path"].startswith("/v1/"):
                if not self.service.is_alive:
                    raise CancelledError
                async with self.turns:
                    await asyncio.sleep(0)
                self.service.scheduler.check(key, self.open)  # where it is full the body need not be read
                taken = Counter([key])
                self.open += taken
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.status:
                raise
            await answer(error)(scope, exchange.receive, exchange.send)
        finally:
            self.open -= taken
            route = getattr(scope.get("route"), "path", "other")
            seconds.labels(route, str(exchange.status)).observe(time.monotonic() - started)

    def _key(self, scope: Scope) -> str:
        """Whose request this is: the number of a key, else the client's address."""
        path = scope["path"]
        if not self.keys or any(path == one or path.startswith(one + "/") for one in self.open_paths):
            return (scope.get("client") or ("",))[0]
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self.keys]
        if kind.lower() != "bearer" or not any(matches):
            remedy = "send one of the server's keys: Authorization: Bearer KEY"
            raise HTTPException(401, remedy, {"WWW-Authenticate": "Bearer"})
        return f"key {matches.index(True)}"


class Exchange:
    """The messages of one request: its body is counted and timed, its answer's status kept."""

    def __init__(self, receive: Receive, send: Send, headers: Headers, limits: ServerLimits) -> None:
        self._receive, self._send, self.limits = receive, send, limits
        self.until = asyncio.get_running_loop().time() + limits.body_seconds
        length = headers.get("content-length", "0")
        self.declared = int(length) if length.isdecimal() else 0
        self.unread = self.declared > 0 or "transfer-encoding" in headers
        self.size = self.status = 0

    async def receive(self) -> Message:
        """The next message; HTTPException when the body is too large or too slow."""
        if not self.unread:
            return await self._receive()
        message: Message = {}
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self.until):
                message = await self._receive() if self.declared <= self.limits.body_bytes else message
        self.size += len(message.get("body", b""))
        if max(self.size, self.declared) > self.limits.body_bytes:
            raise HTTPException(413, f"the body is larger than {self.limits.body_bytes:,} bytes")
        if not message:
            raise HTTPException(408, f"the body took more than {self.limits.body_seconds} s")
        self.unread = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Sends on. Where the body was left unread the connection ends, after a while of throwing it away."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.unread:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif self.unread and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while (await self._receive()).get("more_body"):
                        pass
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)
