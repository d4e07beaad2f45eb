"""The model behind OpenAI's HTTP interface: conversations, pictures, edits."""

import asyncio
import ipaddress
import json
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from socket import socket
from typing import Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from openbagel.serve.errors import answer, as_json, told
from openbagel.serve.guard import Guard, Meters
from openbagel.serve.replies import Conversation, Drawings
from openbagel.serve.schemas import Chat, Draw, Edit
from openbagel.serve.service import Service

Begin = Callable[[Service, str, Any], Awaitable[Conversation | Drawings]]
log = logging.getLogger(__name__)


def create_app(service: Service, *, keys: Collection[str] = (), page: bool = False) -> FastAPI:
    """The server of one model; it closes the service when it ends.

    keys: those that clients must send, on every route but /health. page: the web page too, at /ui, which asks
    for a key by itself.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    async def explain(_: Request, error: Exception) -> Response:
        return answer(error)

    errors: dict[Any, Any] = {HTTPException: explain, RequestValidationError: explain}
    app = FastAPI(title="openbagel", lifespan=life, redoc_url=None, exception_handlers=errors)
    open_paths = ("/health", "/ui") if page else ("/health",)
    app.add_middleware(Guard, service=service, keys=keys, open_paths=open_paths)
    _add_facts(app, service)
    _add_work(app, service)
    if page and find_spec("gradio"):
        from openbagel.serve.web import mount

        mount(app, service, tuple(keys))
    return app


def _add_facts(app: FastAPI, service: Service) -> None:
    """The routes that only tell."""
    registry, labels = prometheus.CollectorRegistry(), ["route", "status"]
    registry.register(Meters(service.scheduler))
    seconds = prometheus.Histogram("openbagel_request_seconds", "by route", labels, registry=registry)
    app.state.seconds = seconds

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        return as_json({"status": "ok" if service.is_alive else "dead"}, 200 if service.is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus.generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def tell(request: Request) -> Response:
        return as_json(facts[request.scope["path"]])

    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "openbagel"}
    facts = {"/v1/limits": asdict(service.limits), "/v1/models": {"object": "list", "data": [model]}}
    facts[f"/v1/models/{service.name}"] = model
    for path in facts:
        app.add_api_route(path, tell)


def _add_work(app: FastAPI, service: Service) -> None:
    """The routes that make something; they stop when the client leaves."""

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        return await _served(service, body, request, Conversation.of)

    @app.post("/v1/images/generations")
    async def generate(body: Draw, request: Request) -> Response:
        return await _served(service, body, request, Drawings.of)

    form = {"schema": Edit.model_json_schema(ref_template="#/components/schemas/{model}")}
    described = {"requestBody": {"content": {"multipart/form-data": form}, "required": True}}

    @app.post("/v1/images/edits", openapi_extra=described)
    async def edit(request: Request) -> Response:
        body = Edit.model_validate(await _form(request, service))
        return await _served(service, body, request, Drawings.of)


async def _form(request: Request, service: Service) -> dict[str, Any]:
    """The fields of a multipart body; NAME[] and the pictures are lists."""
    limits, lists, fields = service.limits, defaultdict[str, list[Any]](list), dict[str, Any]()
    async with request.form(max_files=limits.body_files, max_fields=limits.body_fields) as form:
        for name, value in form.multi_items():
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
            if name == "image" or name.endswith("[]"):
                lists[name.removesuffix("[]")].append(fields.pop(name))
    return fields | lists


async def _served(service: Service, body: Any, request: Request, begin: Begin) -> Response:
    """A reply, unless the client leaves before it begins; fields without effect are named in a header."""
    if body.model not in (None, service.name):
        raise HTTPException(404, f"no model {body.model!r} here; leave it out or name {service.name!r}")

    async def reply() -> Response:
        replies = await begin(service, request.state.key, body)
        return await _streamed(replies.stream()) if body.stream else as_json(await replies.whole())

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(reply()), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        response = working.result()
    finally:
        working.cancel()
        leaving.cancel()
    if ignored := body.ignored:
        response.headers["x-openbagel-ignored"] = ignored
    return response


async def _streamed(events: AsyncGenerator[dict[str, Any]]) -> Response:
    """Server-sent events, begun with the first: what goes wrong before it has a status of its own."""
    first = await anext(events)

    async def lines() -> AsyncGenerator[str]:
        async with aclosing(events):
            yield _line(first)
            try:
                async for tree in events:
                    yield _line(tree)
            except Exception as error:
                log.info("a stream ended early", exc_info=True)
                yield _line(told(error)[1])
            yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _line(tree: dict[str, Any]) -> str:
    return ("event: {type}\n".format(**tree) if "type" in tree else "") + f"data: {json.dumps(tree)}\n\n"


# running ----------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """What `openbagel serve` runs. Told to stop, it ends requests first: their clients hear of it, and
    connections end. It counts no connections: the guard bounds requests, and /health must get in. So the loop
    is asyncio's, which takes in all who wait; with uvloop, which takes in one a turn, /health would stand
    behind a whole crowd.
    """

    def __init__(self, app: FastAPI, service: Service, host: str, port: int) -> None:
        options: Any = {"timeout_graceful_shutdown": 10, "access_log": False}
        super().__init__(uvicorn.Config(app, host, port, loop="asyncio", http="h11", **options))
        self.service = service

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        await self.service.close()
        await super().shutdown(sockets)


def check_public(host: str, keys: Collection[str], insecure: bool) -> None:
    """ValueError where strangers could reach a server that asks for no key, or for an empty one."""
    local = host == "localhost"
    with suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    if not (all(keys) and (local or keys or insecure)):
        raise ValueError(f"{host} needs an --api-key that is not empty, or --insecure if anybody may come in")
