"""The server of `openbagel.serve` on Ray Serve: as many replicas of the model as there are cards.

    serve run openbagel.integrations.ray:app model=nano replicas=2

    client ─▶ Ray's proxy ─▶ Ingress: key, room, size of the body ─▶ a Replica: the same app, one model
                                │  ▲                                          │
                                │  └── died before its answer was complete ◀──┘
                                ▼
                            the answer

An answer in one piece is kept until it is complete and made again by another replica when its own dies; a
stream, of which the client has seen a part, ends with an error event.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from prometheus_client import Histogram
from pydantic import BaseModel
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from openbagel.inference.pipeline import Bagel
from openbagel.inference.scheduler import Full, Load, Scheduler
from openbagel.serve.api import create_app
from openbagel.serve.errors import told
from openbagel.serve.guard import Guard
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Service

PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


class Options(BaseModel, extra="forbid"):
    """Arguments of `app`. name: what clients call the model. cpus, gpus: of a replica. load: options of
    `Bagel.load`. limits: of one replica. keys: those of clients; the environment's OPENBAGEL_API_KEY unless
    given, none lets all in.
    """

    model: str = "nano"
    name: str | None = None
    replicas: int = 1
    cpus: float = 1
    gpus: float = 0
    load: dict[str, Any] = {}
    limits: ServerLimits = ServerLimits()
    keys: list[str] | None = None


class Replica:
    """One model and the app around it."""

    def __init__(self, options: Options) -> None:
        bagel = Bagel.load(options.model, **options.load)
        self.service = Service(bagel, options.limits, name=options.name or options.model)
        self.app = create_app(self.service)

    async def check_health(self) -> None:
        if not self.service.is_alive:
            raise RuntimeError("the model's thread has ended")

    async def __call__(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """What the app sends. Cancelling it, as when the client leaves, cancels the app's work."""
        outbox, unread = asyncio.Queue[Message | None](), [body]

        async def receive() -> Message:
            if not unread:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": unread.pop()}

        working = asyncio.ensure_future(self.app({**scope, "state": {}}, receive, outbox.put))
        working.add_done_callback(lambda _: outbox.put_nowait(None))
        try:
            while (message := await outbox.get()) is not None:
                yield message
            working.result()
        finally:
            working.cancel()

    async def __del__(self) -> None:
        await self.service.close()


class Ingress:
    """Lets requests in and hands them to replicas."""

    def __init__(self, replica: Any, keys: list[str], limits: ServerLimits) -> None:
        self.replica, self.keys, self.limits = replica.options(stream=True), keys, limits

    def __serve_build_asgi_app__(self) -> Starlette:
        served, limits = Starlette(routes=[Mount("/", self.relay)]), self.limits
        load = Load(waiting=limits.queue, of_key=limits.key_queue, running=limits.running)
        # what the guard asks of a service: whether there is room in all replicas together
        room: Any = SimpleNamespace(limits=limits, is_alive=True, scheduler=Scheduler(lambda _: (), load))
        served.add_middleware(Guard, service=room, keys=self.keys, open_paths=("/health",))
        served.state.seconds = Histogram("seconds", "unused", ["route", "status"], registry=None)
        return served

    async def relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on until a replica has answered; the replica takes the key for the client."""
        body = await Request(scope, receive).body()
        passed = {name: scope[name] for name in PASSED} | {"client": (scope["state"]["key"], 0)}
        async with asyncio.timeout(2 * self.limits.request_seconds):
            while not await self._answered(passed, body, send):
                await asyncio.sleep(0.2)

    async def _answered(self, scope: Scope, body: bytes, send: Send) -> bool:
        """False where the replica died, or had no place, and the client has seen nothing of its answer."""
        held, streams = list[Message](), False
        messages: Any = self.replica.remote(scope, body)
        try:
            async for message in messages:
                held.append(message)
                streams = streams or "text/event-stream" in str(message.get("headers"))
                while streams and held:
                    await send(held.pop(0))
        except BackPressureError as error:
            raise Full(1) from error
        except (RayActorError, ObjectLostError):
            if not streams:
                return False
            _, lost = told(HTTPException(503, "the replica that answered has died; send the request again"))
            end = f"data: {json.dumps(lost)}\n\ndata: [DONE]\n\n"
            held = [{"type": "http.response.body", "body": end.encode()}]
        finally:
            messages.cancel()
        for message in held:
            if message.get("status") == 429:
                return False
            await send(message)
        return True


def app(options: Options) -> serve.Application:
    """Builds the application: for `serve run`, a Serve configuration file, or `serve.run(app(Options()))`."""
    keys = os.environ.get("OPENBAGEL_API_KEY", "").split() if options.keys is None else options.keys
    n, one, summed = options.replicas, options.limits, ("queue", "key_queue", "running")
    limits = replace(one, **{name: n * getattr(one, name) for name in summed})
    replica: Any = serve.deployment(Replica, num_replicas=n, **_room(one, options.cpus, options.gpus))
    ingress: Any = serve.deployment(serve.ingress()(Ingress), **_room(limits, spare=1000))
    return ingress.bind(replica.bind(options), keys, limits)


def _room(limits: ServerLimits, cpus: float = 0, gpus: float = 0, *, spare: int = 16) -> dict[str, Any]:
    """Places of a deployment, and spare ones for what costs nothing: `/health`, and at the ingress refusals,
    which have OpenAI's shape only if they come from there and not from Ray.
    """
    places = limits.queue + limits.running + spare
    refused = BackpressureConfig(status_code=429, retry_after_s=1)
    room = {"max_ongoing_requests": places, "max_queued_requests": places, "backpressure_config": refused}
    return room | {"ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}}
