"""Ray Serve on this machine: two replicas, one of which is killed while both are at work."""

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from openbagel.serve.limits import ServerLimits
from openbagel.weights import save_checkpoint
from tests import tiny

slow = pytest.mark.slow
PORT = 18431
STEPS = 20
SLOW_STEPS = 2000
REQUESTS = 16
LIMITS = ServerLimits(batch=1, running=4, queue=10, key_queue=10, steps=10_000)
"""Two replicas take 28 at a time: all that `test_a_killed_replica` sends, not all of a crowd."""
SECONDS = 200


def processes() -> list[psutil.Process]:
    """Those of Ray: all that descend from this one and its daemons."""
    return psutil.Process().children(recursive=True)


def replicas() -> list[psutil.Process]:
    return [one for one in processes() if "ray::ServeReplica:default:Replica" in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of two replicas of the tiny model; ends them, and sees that no process is left."""
    pytest.importorskip("ray.serve")
    for name in ("READY", "HEALTH"):  # on a machine with other work
        os.environ[f"RAY_SERVE_PROXY_{name}_CHECK_TIMEOUT_S"] = "200"
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    import ray
    from ray import serve

    from openbagel.integrations.ray import Options, app

    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(folder, tiny.checkpoint())
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    with suppress(TimeoutError):  # Ray waits a minute for its proxy; on a busy machine it comes later
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(app(Options(model=str(folder), name="tiny", replicas=2, limits=LIMITS, keys=["secret"])))
    yield f"http://127.0.0.1:{PORT}"
    left = processes()
    serve.shutdown()
    ray.shutdown()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive, [process.cmdline() for process in alive]


def client(base: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=200)
    key = {"Authorization": "Bearer secret"}
    return httpx.AsyncClient(base_url=base, headers=key, timeout=SECONDS, limits=limits, trust_env=False)


def drawing(seed: int, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "seed": seed, "num_inference_steps": steps, "size": "12x8", **more}


async def draw(to: httpx.AsyncClient, seed: int) -> httpx.Response:
    return await to.post("/v1/images/generations", json=drawing(seed))


def picture(response: httpx.Response) -> bytes:
    assert response.status_code == 200, response.text
    data = base64.b64decode(response.json()["data"][0]["b64_json"])
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def expected(seed: int) -> bytes:
    sampling = replace(tiny.config().settings.draw, num_timesteps=STEPS + 1)
    return tiny.bagel().using(sampling).generate("a red circle", seed=seed, size=(8, 12)).tobytes()


async def stream(to: httpx.AsyncClient, seed: int, begun: asyncio.Event) -> list[str]:
    """The data of a stream's events."""
    body = drawing(seed, SLOW_STEPS, stream=True, partial_images=3)
    heard = []
    async with to.stream("POST", "/v1/images/generations", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            begun.set()
            heard += [line.removeprefix("data: ")] if line.startswith("data: ") else []
    return heard


async def metric(to: httpx.AsyncClient, name: str) -> float:
    """One replica's, whichever answers."""
    lines = (await to.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


async def on_both(to: httpx.AsyncClient) -> list[asyncio.Task[list[str]]]:
    """Streams under way, begun one by one until either replica has some: Ray may give many to the same."""
    streams = list[asyncio.Task[list[str]]]()
    while True:
        begun = asyncio.Event()
        streams = [task for task in streams if not task.done()]
        streams.append(asyncio.create_task(stream(to, len(streams), begun)))
        await asyncio.wait_for(begun.wait(), SECONDS)
        if 0 < await metric(to, "openbagel_running") < sum(not task.done() for task in streams):
            return streams


@slow
def test_every_route_but_health_wants_a_key(base: str) -> None:
    assert httpx.get(base + "/health").json() == {"status": "ok"}
    refused = httpx.get(base + "/v1/models")
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"

    async def test() -> None:
        async with client(base) as to:
            assert (await to.get("/v1/models")).json()["data"][0]["id"] == "tiny"
            large = await to.post("/v1/chat/completions", content=bytes(LIMITS.body_bytes + 1))
            assert large.status_code == 413

    asyncio.run(test())


@slow
def test_a_crowd_is_refused_with_a_time_to_come_back(base: str) -> None:
    async def test() -> None:
        async with client(base) as to:
            answers = await asyncio.gather(*(draw(to, seed) for seed in range(60)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(refused) <= 32
        assert {answer.status_code for answer in refused} == {429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["error"]["code"] == "queue_full" for answer in refused)

    asyncio.run(test())


@slow
def test_a_client_who_leaves_ends_its_request(base: str) -> None:
    async def test() -> None:
        async with client(base) as to:
            begun = asyncio.Event()
            leaving = asyncio.create_task(stream(to, 0, begun))
            await begun.wait()
            leaving.cancel()
            async with asyncio.timeout(SECONDS):
                while not await metric(to, "openbagel_cancelled_total"):
                    await asyncio.sleep(0.1)

    asyncio.run(test())


@slow
def test_a_killed_replica_loses_no_request(base: str) -> None:
    async def test() -> tuple[list[httpx.Response], list[list[str]]]:
        async with client(base) as to:
            streams = await on_both(to)
            drawings = [asyncio.create_task(draw(to, seed)) for seed in range(REQUESTS)]
            await asyncio.sleep(0.5)
            replicas()[0].kill()
            return await asyncio.gather(*drawings), await asyncio.gather(*streams)

    assert len(replicas()) == 2
    answers, streams = asyncio.run(test())
    assert [picture(answer) for answer in answers] == [expected(seed) for seed in range(REQUESTS)]
    ends = [json.loads(heard[-2]) for heard in streams]
    lost = [end for end in ends if "error" in end]
    assert 0 < len(lost) < len(ends)
    assert all("died" in end["error"]["message"] for end in lost)
    assert all(end["type"] == "image_generation.completed" for end in ends if end not in lost)
    assert {heard[-1] for heard in streams} == {"[DONE]"}


# without Ray's processes ----------------------------------------------------------------------------------


class Replicas:
    """Stands for the handle of the replicas: each call gives the next of these answers."""

    def __init__(self, answers: Sequence[Sequence[Any]]) -> None:
        self.answers, self.asked = iter(answers), list[tuple[dict[str, Any], bytes]]()

    def options(self, *, stream: bool) -> "Replicas":
        assert stream
        return self

    def remote(self, scope: dict[str, Any], body: bytes) -> "Messages":
        self.asked.append((scope, body))
        return Messages(next(self.answers))


class Messages:
    def __init__(self, messages: Sequence[Any]) -> None:
        self.messages, self.cancelled = messages, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self.messages:
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self) -> None:
        self.cancelled = True


def start(status: int = 200, kind: bytes = b"application/json") -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def asked(*answers: Sequence[Any]) -> tuple[httpx.Response, Replicas]:
    """What the ingress answers where replicas answer so."""
    from openbagel.integrations.ray import Ingress

    replicas: Any = Replicas(answers)
    app = Ingress(replicas, ["secret"], LIMITS).__serve_build_asgi_app__()

    async def test() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        key = {"Authorization": "Bearer secret"}
        async with httpx.AsyncClient(base_url="http://a", headers=key, transport=transport) as to:
            return await to.post("/v1/images/generations", content=b"{}")

    return asyncio.run(test()), replicas


def test_the_ingress_asks_again_until_an_answer_is_whole() -> None:
    from ray.exceptions import ActorDiedError, ActorUnavailableError

    whole = [start(), part(b"right")]
    answer, replicas = asked(
        [ActorDiedError()],
        [start(), part(b"wr", more=True), ActorUnavailableError("gone", None)],
        [start(429), part(b"full")],
        whole,
    )
    assert (answer.status_code, answer.content, len(replicas.asked)) == (200, b"right", 4)
    assert all(body == b"{}" and scope["client"] == ("key 0", 0) for scope, body in replicas.asked)
    assert asked([start(400), part(b"no")])[0].status_code == 400


def test_a_stream_that_broke_off_is_not_made_again() -> None:
    from ray.exceptions import ActorDiedError

    answer, replicas = asked(
        [start(kind=b"text/event-stream; charset=utf-8"), part(b"data: 1\n\n", more=True), ActorDiedError()]
    )
    first, error, done, _ = answer.text.split("\n\n")
    assert (first, done, len(replicas.asked)) == ("data: 1", "data: [DONE]", 1)
    told = json.loads(error.removeprefix("data: "))["error"]
    assert told["type"] == "server_error" and "died" in told["message"]


def test_without_a_place_the_client_may_come_back() -> None:
    from ray.serve.exceptions import BackPressureError

    answer, _ = asked([BackPressureError(1, 1)])
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_arguments_of_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    from openbagel.integrations.ray import Options, app

    monkeypatch.setenv("OPENBAGEL_API_KEY", "one two")
    built = app(Options.model_validate({"replicas": "2", "gpus": "1", "limits": {"queue": 5}}))
    deployment = built._bound_deployment
    replica, keys, limits = deployment.init_args
    assert keys == ["one", "two"] and (limits.queue, limits.running) == (10, 32)
    assert replica._bound_deployment.num_replicas == 2
    assert replica._bound_deployment.ray_actor_options == {"num_cpus": 1, "num_gpus": 1}
    with pytest.raises(ValueError, match="replica"):
        Options.model_validate({"replica": 2})
