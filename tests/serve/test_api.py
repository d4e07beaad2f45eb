"""The HTTP interface on a tiny model: keys, errors, leaving clients, memory, the worker's death."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from openbagel.serve.api import check_public, create_app
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Service
from tests import tiny
from tests.serve.live import running

DRAW = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
LONG = DRAW | {"num_inference_steps": 200}
ASK = {"messages": [{"role": "user", "content": "how many?"}]}
DRAWINGS, CHAT, EDITS = "/v1/images/generations", "/v1/chat/completions", "/v1/images/edits"


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(tiny.bagel(), ServerLimits(request_seconds=20), name="tiny")


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with running(service) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def is_error(reply: httpx.Response, status: int) -> bool:
    error = reply.json()["error"]
    told = {"message", "type", "code", "param"} == set(error) and isinstance(error["message"], str)
    return reply.status_code == status and told and "Traceback" not in reply.text


def until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return done


def idle(service: Service) -> bool:
    return not (service.scheduler.running or service.scheduler.num_waiting)


# keys -------------------------------------------------------------------------------------------------------


def test_every_route_but_health_asks_for_a_key():
    with running(Service(tiny.bagel(), ServerLimits()), keys=("secret", "schlüssel")) as url:
        paths: dict[str, set[str]] = {route.path: route.methods for route in routes()}
        paths |= {"/docs": {"GET"}, "/openapi.json": {"GET"}, "/nowhere": {"GET"}, "/ui": {"GET"}}
        assert {DRAWINGS, CHAT, EDITS, "/metrics", "/v1/limits", "/v1/models", "/health"} <= set(paths)
        for path, methods in paths.items():
            for method in methods - {"HEAD"}:
                for key in (None, "Bearer wrong", "Basic secret", "Bearer", "secret", "Bearer secret2"):
                    headers = {"authorization": key} if key else {}
                    reply = httpx.request(method, url + path, headers=headers)
                    is_open = path == "/health"
                    assert reply.status_code == 200 if is_open else is_error(reply, 401), (path, key)
                    assert is_open or reply.headers["www-authenticate"] == "Bearer"
        for key in ("secret", "schlüssel"):
            right = {"authorization": b"bearer " + key.encode()}
            for path, methods in paths.items():
                for method in methods - {"HEAD"}:
                    reply = httpx.request(method, url + path, headers=right, json={})
                    assert reply.status_code in (200, 404, 422), (path, reply.text)


def routes() -> list[Any]:
    service = Service(tiny.bagel(), ServerLimits())
    service.worker.close()
    return [route for route in create_app(service).routes if getattr(route, "methods", None)]


def test_the_page_asks_for_a_key_by_itself():
    pytest.importorskip("gradio")
    service = Service(tiny.bagel(), ServerLimits())
    client = TestClient(create_app(service, keys=("secret",), page=True))
    for path in ("/ui/config", "/ui/gradio_api/info", "/uix", "/v1/models", "/metrics"):
        assert client.get(path).status_code == 401, path
    assert client.post("/ui/gradio_api/upload", files={"files": b"x"}).status_code == 401
    assert client.get("/ui/").status_code == 200  # where the key is asked for
    service.worker.close()


def test_no_public_address_without_a_key():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_public(host, (), False)
    check_public("0.0.0.0", ("key",), False)
    check_public("0.0.0.0", (), True)
    for host, keys in (("0.0.0.0", ()), ("192.168.0.7", ()), ("example.com", ()), ("::", ()), ("::1", ("",))):
        with pytest.raises(ValueError, match="--api-key"):
            check_public(host, keys, False)


# errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/models/other", None, 404),
        ("GET", DRAWINGS, None, 405),
        ("POST", DRAWINGS, b"{", 422),
        ("POST", DRAWINGS, b"", 422),
        ("POST", DRAWINGS, b"\xff\xfe", 422),
        ("POST", DRAWINGS, b"[" * 100_000, 400),
        ("POST", DRAWINGS, b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
        ("POST", DRAWINGS, {"prompt": 3}, 422),
        ("POST", DRAWINGS, {"prompt": "x", "\ud800": 1}, 422),
        ("POST", DRAWINGS, {"prompt": "\ud800"}, 422),
        ("POST", DRAWINGS, {"prompt": "x", "seed": -1}, 422),
        ("POST", DRAWINGS, {"prompt": "x", "guidance_scale": float("nan")}, 422),
        ("POST", DRAWINGS, {"prompt": "x", "renorm": "local"}, 422),
        ("POST", DRAWINGS, {"prompt": "x", "guidance_interval": [1, 0]}, 400),
        ("POST", DRAWINGS, {"prompt": "x", "renorm_min": 7}, 400),
        ("POST", DRAWINGS, {"prompt": "x", "height": 8}, 400),
        ("POST", DRAWINGS, {"prompt": "x", "size": "huge"}, 422),
        ("POST", DRAWINGS, {"prompt": "x", "background": "transparent"}, 400),
        ("POST", DRAWINGS, {"prompt": "x", "extra_body": {"sed": 3}}, 422),
        ("POST", CHAT, {"messages": []}, 422),
        ("POST", CHAT, {"messages": [{"role": "user", "content": ""}]}, 400),
        ("POST", CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 422),
        ("POST", CHAT, {**ASK, "modalities": ["audio"]}, 422),
        ("POST", CHAT, {**ASK, "stream": True, "model": "other"}, 404),
        ("POST", EDITS, {"prompt": "x"}, 422),
    ],
)
def test_errors_have_one_shape(client: httpx.Client, method: str, path: str, body: Any, status: int):
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    reply = client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert is_error(reply, status), reply.text


@pytest.mark.parametrize(
    ("path", "body", "param", "word"),
    [
        (CHAT, [{"type": "input_image"}], "messages.0.content.0.type", "'text' or 'image_url'"),
        (CHAT, [{"type": "image_url", "image_url": {}}], "messages.0.content.0.image_url.url", "required"),
        (CHAT, 3, "messages.0.content", "list"),
        (EDITS, {"guidance_interval[]": "a"}, "guidance_interval.0", "guidance_interval"),
        (EDITS, {"n": "many"}, "n", "n: "),
    ],
)
def test_errors_name_the_place(client: httpx.Client, path: str, body: Any, param: str, word: str):
    if path == CHAT:
        reply = client.post(path, json={"messages": [{"role": "user", "content": body}]})
    else:
        reply = client.post(path, data={"prompt": "x", **body}, files={"image": b"x"})
    assert is_error(reply, 422) and reply.json()["error"]["param"] == param, reply.text
    assert word in reply.json()["error"]["message"] and "valid string" not in reply.text


def test_json_comes_as_json(client: httpx.Client):
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = client.post(CHAT, content=json.dumps(ASK), headers=headers)
        assert is_error(reply, 422) and "content-type: application/json" in reply.text


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "https://127.0.0.1/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "data:image/png;base64,AAAA",
    ],
)
def test_pictures_come_as_data_only(client: httpx.Client, url: str):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    reply = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert is_error(reply, 400), reply.text


def test_what_nobody_foresaw_is_an_id(client: httpx.Client, service: Service, caplog, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("private words")

    monkeypatch.setattr(type(service.bagel), "chat_request", broken)
    reply = client.post(DRAWINGS, json=DRAW)
    assert is_error(reply, 500) and "private" not in reply.text
    name = reply.json()["error"]["message"].split()[-1]
    assert any(name in record.message for record in caplog.records)


def test_an_error_within_a_stream_ends_it(client: httpx.Client, service: Service, monkeypatch):
    decode, calls = service.bagel.decode, []

    def fail_later(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("private words")
        return decode(*args, **keywords)

    monkeypatch.setattr(service.bagel, "decode", fail_later)
    body = DRAW | {"stream": True, "partial_images": 2, "num_inference_steps": 6}
    reply = client.post(DRAWINGS, json=body)
    *events, end = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert reply.status_code == 200 and end == "[DONE]" and "private" not in reply.text
    assert json.loads(events[0])["type"] == "image_generation.partial_image"
    assert json.loads(events[-1])["error"]["type"] == "server_error"


def test_only_the_request_without_memory_fails(client: httpx.Client, service: Service, monkeypatch):
    """Every third request runs out of memory, whatever it is packed with."""
    step = service.bagel.engine.step

    def short_of_memory(forwards: Any) -> Any:
        if any(row.context in poor for forward in forwards for row in forward.rows):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(forwards)

    poor: set[Any] = set()
    request = type(service.bagel).chat_request

    def chat_request(self: Any, *args: Any, seed: int, **options: Any) -> Any:
        inner = request(self, *args, seed=seed, **options)

        def watched() -> Any:
            results = None
            while True:
                try:
                    item = inner.send(results)
                except StopIteration as stop:
                    return stop.value
                if seed % 3 == 0 and hasattr(item, "rows"):
                    poor.update(row.context for row in item.rows)
                results = yield item

        return watched()

    monkeypatch.setattr(service.bagel.engine, "step", short_of_memory)
    monkeypatch.setattr(type(service.bagel), "chat_request", chat_request)
    with ThreadPoolExecutor(9) as pool:
        replies = list(pool.map(lambda seed: client.post(DRAWINGS, json={**DRAW, "seed": seed}), range(9)))
    assert [reply.status_code for reply in replies] == [503, 200, 200] * 3
    assert is_error(replies[0], 503) and replies[0].json()["error"]["code"] == "out_of_memory"
    assert client.get("/health").status_code == 200


# clients that leave -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_leaving_client_ends_its_request(client: httpx.Client, service: Service, stream: bool):
    body = json.dumps(LONG | {"stream": stream, "partial_images": 3 if stream else 0}).encode()
    where = urlsplit(str(client.base_url))
    cancelled = service.scheduler.counts["cancelled"]
    with closing(socket.create_connection((where.hostname, where.port))) as line:
        head = f"POST {DRAWINGS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert until(lambda: service.bagel.engine.passes > 0 and not idle(service))
        if stream:
            assert b"200 OK" in line.recv(4096)
    assert until(lambda: idle(service))
    assert service.scheduler.counts["cancelled"] == cancelled + 1
    passes = service.bagel.engine.passes
    time.sleep(0.2)
    assert service.bagel.engine.passes == passes


def test_a_request_that_takes_too_long(service: Service):
    limits = ServerLimits(request_seconds=0.2)
    with running(Service(tiny.bagel(), limits)) as url:
        reply = httpx.post(url + DRAWINGS, json=LONG)
        assert is_error(reply, 504) and reply.json()["error"]["code"] == "timeout"


def test_closing_answers_what_runs():
    replies: list[httpx.Response] = []
    service = Service(tiny.bagel(), ServerLimits())
    with running(service) as url:
        thread = Thread(target=lambda: replies.append(httpx.post(url + DRAWINGS, json=LONG, timeout=30)))
        thread.start()
        assert until(lambda: not idle(service))
    thread.join(10)
    assert is_error(replies[0], 503) and replies[0].json()["error"]["code"] == "closing"


def test_a_dead_worker_is_told(monkeypatch):
    service = Service(tiny.bagel(), ServerLimits())
    with running(service) as url:
        assert httpx.get(url + "/health").json() == {"status": "ok"}
        assert httpx.head(url + "/health").status_code == 200
        service.worker.close()
        assert httpx.get(url + "/health").status_code == httpx.head(url + "/health").status_code == 503
        assert is_error(httpx.post(url + DRAWINGS, json=DRAW), 503)


def test_metrics_count(client: httpx.Client):
    client.post(DRAWINGS, json=DRAW)
    told = client.get("/metrics").text
    assert 'openbagel_request_seconds_count{route="/v1/images/generations",status="200"}' in told
    for name in ("waiting", "running", "packs_total", "forwards_total", "accepted_total"):
        assert f"\nopenbagel_{name} " in told
    assert "/nowhere" not in told


def test_the_schema_describes_bodies(client: httpx.Client):
    tree = client.get("/openapi.json").json()
    names = tree["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "mask", "prompt", "guidance_scale"} <= set(names["properties"])
    assert "Renorm" in tree["components"]["schemas"]
