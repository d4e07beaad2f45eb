"""What a server takes in: sizes, time, places, and the caps of one request."""

import asyncio
import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from prometheus_client import Histogram
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from openbagel.inference.scheduler import Job, Load, Scheduler
from openbagel.serve.guard import Guard
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Service
from tests import tiny
from tests.serve.live import running
from tests.serve.test_api import CHAT, DRAW, DRAWINGS, EDITS, LONG, is_error, until

BODY = 100_000
LIMITS = ServerLimits(body_bytes=BODY, body_seconds=1.0, queue=1, key_queue=1, running=2, n=3, steps=250)


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(tiny.bagel(), LIMITS, name="tiny")


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


def png(width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


def chunks(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"x" * 20_000


def test_large_bodies_are_refused(url: str):
    """By their declared size, by their counted size, and as parts of a form."""
    headers = {"content-type": "application/json"}
    declared = httpx.post(url + DRAWINGS, content=b"x" * 5_000_000, headers=headers, timeout=20)
    counted = httpx.post(url + DRAWINGS, content=chunks(250), headers=headers, timeout=20)
    form = httpx.post(url + EDITS, data={"prompt": "x"}, files={"image": b"x" * 5_000_000}, timeout=20)
    for reply in (declared, counted, form):
        assert is_error(reply, 413) and reply.headers["connection"] == "close"


def test_slow_bodies_end(url: str):
    where = urlsplit(url)
    with closing(socket.create_connection((where.hostname, where.port), timeout=10)) as line:
        head = f"POST {DRAWINGS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        started, told = time.monotonic(), b""
        with suppress(OSError):
            while time.monotonic() < started + 10:
                line.sendall(b"x")
                time.sleep(0.1)
                with suppress(BlockingIOError):
                    told += line.recv(4096, socket.MSG_DONTWAIT)
        assert b" 408 " in told and b'"error"' in told
        assert time.monotonic() < started + 6


def test_a_full_queue_is_told_before_the_body_is_read(url: str, service: Service):
    where = urlsplit(url)
    body = json.dumps(LONG).encode()
    head = f"POST {DRAWINGS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    lines = []
    for count in (1, 2, 3):
        lines.append(socket.create_connection((where.hostname, where.port), timeout=10))
        lines[-1].sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        busy = (min(count, 2), max(count - 2, 0))
        assert until(lambda: (len(service.scheduler.running), service.scheduler.num_waiting) == busy)  # noqa: B023
    with closing(socket.create_connection((where.hostname, where.port), timeout=10)) as line:
        line.sendall(f"{head}{BODY}\r\n\r\n".encode())  # and nothing more
        told = b"".join(iter(lambda: line.recv(4096), b""))
    assert b" 429 " in told and b"retry-after: " in told.lower() and b"queue_full" in told
    started = time.monotonic()
    assert httpx.get(url + "/health").status_code == 200 and time.monotonic() < started + 1
    for line in lines:
        line.close()
    assert until(lambda: not service.scheduler.running)
    assert httpx.post(url + DRAWINGS, json=DRAW).status_code == 200


def test_what_only_tells_goes_in_between_a_crowd():
    """A /health that comes after a hundred posts is not answered after them."""
    load = Load(waiting=1)
    room: Any = SimpleNamespace(limits=LIMITS, is_alive=True, scheduler=Scheduler(lambda _: (), load))
    room.scheduler.submit(Job(iter))  # pyright: ignore[reportArgumentType]

    async def health(_: Request) -> Response:
        return Response("ok")

    served = Starlette(routes=[Route("/health", health)])
    served.add_middleware(Guard, service=room, keys=(), open_paths=("/health",))
    served.state.seconds = Histogram("seconds", "unused", ["route", "status"], registry=None)
    told = list[int]()

    async def ask(verb: str, path: str) -> None:
        async def send(message: Any) -> None:
            told.extend([message["status"]] if "status" in message else [])

        async def receive() -> Any:
            return {"type": "http.request"}

        await served({"type": "http", "method": verb, "path": path, "headers": []}, receive, send)

    async def run() -> None:
        await asyncio.gather(*(ask("POST", DRAWINGS) for _ in range(100)), ask("GET", "/health"))

    asyncio.run(run())
    assert told.count(429) == 100 and told.index(200) < 10


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (DRAWINGS, DRAW | {"n": 3}, "2 n"),
        (DRAWINGS, DRAW | {"num_inference_steps": 251}, "250 steps"),
        (DRAWINGS, DRAW | {"size": "4096x4096"}, "output_pixels"),
        (DRAWINGS, DRAW | {"prompt": "x" * 60_000, "negative_prompt": ""}, "texts"),
        (DRAWINGS, DRAW | {"negative_prompt": "x" * 60_000}, "texts"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000}, "tokens"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "é" * 10_000}], "max_tokens": 1},
            "8,192 text_tokens",
        ),
    ],
)
def test_caps_of_a_request(path: str, body: Any, word: str):
    limits = ServerLimits(n=2, steps=250, texts=50_000)
    with running(Service(tiny.bagel(), limits)) as url:
        reply = httpx.post(url + path, json=body)
        assert is_error(reply, 400) and word in reply.json()["error"]["message"], reply.text


def test_pictures_and_parts_are_counted(url: str):
    files = [("image[]", ("x.png", png(), "image/png"))] * 17
    assert is_error(httpx.post(url + EDITS, data={"prompt": "x"}, files=files), 400)
    fields = {f"field{i}": "x" for i in range(70)}
    assert is_error(httpx.post(url + EDITS, data=fields, files=files[:1]), 400)
    parts = [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}] * 17
    reply = httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": parts}]})
    assert is_error(reply, 400) and "17 pictures" in reply.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"GIF89a", png()[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 50], ids=str)
def test_what_is_no_picture_is_refused(url: str, content: bytes):
    reply = httpx.post(url + EDITS, data={"prompt": "x"}, files={"image": ("x.png", content, "image/png")})
    assert is_error(reply, 400), reply.text


def test_a_bomb_is_refused(url: str):
    bomb = Image.new("1", (20_000, 20_000))
    file = io.BytesIO()
    bomb.save(file, "png")
    assert len(file.getvalue()) < BODY
    reply = httpx.post(url + EDITS, data={"prompt": "x"}, files={"image": file.getvalue()})
    assert is_error(reply, 400) and "too many pixels" in reply.text


def test_a_form_takes_extras(url: str):
    form = {"prompt": "x", "num_inference_steps": "2", "guidance_interval[]": ["0.1", "0.9"], "seed": "3"}
    form |= {"taylorseer": "true", "renorm": "global", "size": "8x8", "response_format": "b64_json"}
    reply = httpx.post(url + EDITS, data=form, files={"image": png()})
    assert reply.status_code == 200 and reply.json()["size"] == "8x8", reply.text


def test_strange_forms_are_the_sender_s_fault(url: str):
    data_url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for form in (
        {"prompt": "x", "": "1", "[]": "2"},
        {"prompt": "x", "mask": data_url},
        {"prompt": "x", "mask": ""},
        {"prompt": ["x"], "prompt[]": ["y"]},
        {"prompt": "x", "n": "many"},
    ):
        reply = httpx.post(url + EDITS, data=form, files={"image": png()})
        assert reply.status_code in (400, 422) and is_error(reply, reply.status_code), reply.text
    reply = httpx.post(url + EDITS, data={"prompt": "x", "image": data_url}, files={"mask": png()})
    assert reply.status_code == 200


def test_all_replies_are_made_or_none():
    """With two of three places taken; and more than fit when all are free are refused for good."""
    service = Service(tiny.bagel(), ServerLimits(queue=3, running=1))
    with running(service) as url:
        lines = []
        for count in (1, 2, 3):
            lines.append(socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10))
            body = json.dumps(LONG).encode()
            head = f"POST {DRAWINGS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            lines[-1].sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert until(lambda: len(service.scheduler.running) + service.scheduler.num_waiting == count)  # noqa: B023
        reply = httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": "x"}], "n": 2})
        assert is_error(reply, 429)
        for line in lines:
            line.close()
        assert until(lambda: service.scheduler.counts["cancelled"] == 4)
        assert not service.scheduler.counts["done"]
        reply = httpx.post(url + DRAWINGS, json=DRAW | {"n": 4})
        assert is_error(reply, 400) and "limit of 3 n" in reply.text
        assert len(httpx.post(url + DRAWINGS, json=DRAW | {"n": 3}, timeout=20).json()["data"]) == 3


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({"picture_formats": ("PNG", "HEIC")}, "'HEIC' is none of"),
        ({"body_bytes": -5}, "body_bytes -5 must be at least 0"),
        ({"request_seconds": -1.0}, "request_seconds -1.0"),
        ({"url_seconds": float("nan")}, "url_seconds nan"),
        ({"running": 0}, "running 0 must be at least 1"),
    ],
)
def test_limits_that_make_no_sense(limits: Any, word: str):
    with pytest.raises(ValueError, match=word):
        ServerLimits(**limits)


def test_limits_are_shown(url: str):
    told = httpx.get(url + "/v1/limits").json()
    assert told["body_bytes"] == BODY and told["n"] == 1 and told["url_hosts"] == []
