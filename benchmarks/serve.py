"""What the server bears: each measurement prints a line of figures, those out of bounds marked.

    python -m benchmarks.serve                                   all of them; hours
    python -m benchmarks.serve crowd large --scale 0.1           some of them, a tenth of the size
    python -m benchmarks.serve soak --minutes 30

The server is `openbagel serve` in a process of its own, on random weights of width 64 (throughput and
latency: nano); the clients are here. Exit code 1 when a bound is broken.
"""

import argparse
import asyncio
import json
import random
import select
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import hostile
from benchmarks.hostile import CHAT, DRAWINGS, EDITS, form
from benchmarks.server import SECONDS, Server, Watch, health, post_at_once, serving
from openbagel.weights import save_checkpoint
from tests import tiny

CAPS = {"steps": 50, "tokens": 8, "n": 2, "body_seconds": 3.0, "output_pixels": 1024}
SHORT = {"prompt": "a red circle", "num_inference_steps": 3, "size": "8x8"}
SECRET = "the canary sings at midnight"
LARGE_BYTES = 300 * 10**6
TURNS = 5
"""Of schemathesis, which sometimes finds no case, or fails in making one of a file ("Unsupported type")."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and the bounds that it should keep."""

    name: str
    value: float
    most: float = float("inf")
    least: float = float("-inf")

    @property
    def holds(self) -> bool:
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        bound = "" if self.holds else f" (out of bounds: {self.least:g} to {self.most:g})"
        return f"{self.name} {self.value:.4g}{bound}"


Figures = list[Figure]


def broken(figures: Figures) -> list[str]:
    return [str(figure) for figure in figures if not figure.holds]


def client(server: Server, **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, timeout=SECONDS, limits=limits, trust_env=False, **options)


def is_told(status: int, text: str) -> bool:
    """Whether an answer is right, or an error in OpenAI's shape."""
    with suppress(ValueError, KeyError, TypeError):
        return status < 400 or {"message", "type", "code", "param"} == {*json.loads(text)["error"]}
    return False


# how fast --------------------------------------------------------------------------------------------------


def _asking(text: str, words: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": words, "temperature": 0}


async def _rate(server: Server, path: str, body: dict[str, Any], clients: int, count: int) -> float:
    """Answers a second when so many clients ask in turn, `count` times in all."""
    async with client(server) as to:

        async def ask(number: int) -> None:
            for seed in range(number, count, clients):
                (await to.post(path, json=body | {"seed": seed})).raise_for_status()

        started = time.monotonic()
        await asyncio.gather(*map(ask, range(clients)))
        return count / (time.monotonic() - started)


def throughput(server: Server, count: int) -> Figures:
    """Pictures and answers a second of one client and of eight, the two taking turns."""
    figures = Figures()
    work = {
        "pictures": (DRAWINGS, {"prompt": "a red circle above a blue square", "num_inference_steps": 10}),
        "answers": (CHAT, _asking("how many circles are there?", 32)),
    }
    for name, (path, body) in work.items():
        asyncio.run(_rate(server, path, body, 2, 2))
        rates = [[asyncio.run(_rate(server, path, body, n, count)) for n in (1, 8)] for _ in range(2)]
        one, eight = map(max, zip(*rates, strict=True))
        figures += [Figure(f"{name}/s of 1 client", one), Figure("of 8", eight)]
        figures.append(Figure("ratio", eight / one, least=1.0))
    return figures


def latency(server: Server, count: int) -> Figures:
    """Seconds of a short answer alone, and while four pictures are drawn without end."""
    ask = _asking("how many circles are there?", 8)

    async def seconds(to: httpx.AsyncClient) -> float:
        taken = []
        for _ in range(count):
            started = time.monotonic()
            (await to.post(CHAT, json=ask)).raise_for_status()
            taken.append(time.monotonic() - started)
        return sorted(taken)[len(taken) // 2]

    async def measure() -> tuple[float, float, float]:
        async with client(server) as to:
            await seconds(to)

            async def draw() -> None:
                while True:
                    await to.post(DRAWINGS, json={"prompt": "a red circle", "num_inference_steps": 25})

            started = time.monotonic()
            (await to.post(DRAWINGS, json={"prompt": "a red circle"})).raise_for_status()
            picture = time.monotonic() - started
            alone = await seconds(to)
            drawing = [asyncio.create_task(draw()) for _ in range(4)]
            await asyncio.sleep(0.5)
            among = await seconds(to)
            for task in drawing:
                task.cancel()
            return picture, alone, among

    picture, alone, among = asyncio.run(measure())
    figures = [Figure("seconds of an answer alone", alone), Figure("among pictures", among)]
    return [*figures, Figure("ratio", among / alone, most=10), Figure("seconds of a picture", picture)]


# what is sent ----------------------------------------------------------------------------------------------


def schemathesis(server: Server, count: int) -> Figures:
    """Cases that schemathesis makes of the server's own schema, right and wrong ones."""
    import hypothesis
    import schemathesis as st

    schema = st.openapi.from_url(server.url + "/openapi.json")
    found = Counter[str]()
    operations = [one.ok() for one in schema.get_all_operations()]
    heavy = [one for one in operations if one.method.upper() == "POST"]

    def run(operation: Any, mode: Any, cases: int, turn: int) -> None:
        @hypothesis.settings(
            max_examples=cases, database=None, deadline=None, suppress_health_check=[*hypothesis.HealthCheck]
        )
        @hypothesis.seed(turn)
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def test(case: Any) -> None:
            answer = case.call(timeout=SECONDS)
            found["cases"] += 1
            found[f"{answer.status_code // 100}xx"] += 1
            found["unshaped"] += not is_told(answer.status_code, answer.text)

        test()

    modes = [st.GenerationMode.POSITIVE, st.GenerationMode.NEGATIVE]
    for operation in operations:
        for mode in modes:
            share = 0.9 / len(heavy) if operation in heavy else 0.1 / max(1, len(operations) - len(heavy))
            wanted = found["cases"] + max(1, round(count * share / 2))
            for turn in range(TURNS):
                with suppress(hypothesis.errors.Unsatisfiable, ValueError):
                    run(operation, mode, max(1, wanted - found["cases"]), turn)
                if found["cases"] >= wanted:
                    break
    figures = [Figure("cases", found["cases"], least=count // 2), Figure("2xx", found["2xx"], least=1)]
    figures += [Figure("4xx", found["4xx"], least=1), Figure("5xx", found["5xx"], most=0)]
    return [*figures, Figure("errors of another shape", found["unshaped"], most=0)]


def bodies(server: Server, count: int) -> Figures:
    """Malformed bodies and pictures, eight at a time."""
    found, sent = Counter[str](), hostile.bodies(count)

    async def send(to: httpx.AsyncClient) -> None:
        for path, headers, body in sent:
            answer = await to.post(path, headers=headers, content=body)
            found["answered"] += 1
            found[f"{answer.status_code // 100}xx"] += 1
            found["unshaped"] += not is_told(answer.status_code, answer.text)

    async def run() -> None:
        async with client(server) as to:
            await asyncio.gather(*(send(to) for _ in range(8)))

    before = server.megabytes(decoders=False)
    with Watch(server) as watch:
        asyncio.run(run())
    kept = server.megabytes(decoders=False) - before
    figures = [Figure("answered", found["answered"], least=count), Figure("2xx", found["2xx"])]
    figures += [
        Figure("5xx", found["5xx"], most=0),
        Figure("errors of another shape", found["unshaped"], most=0),
    ]
    # two decoders and the server, each with a picture of 16.8 Mpx, for a moment
    return [*figures, Figure("MB more at the peak", watch.grown, most=512), Figure("kept", kept, most=100)]


def large(server: Server, size: int = LARGE_BYTES) -> Figures:
    """A body of 300 MB, told in its header, chunked, and as a form; and one that comes byte by byte."""
    told, kind = f"content-length: {size}\r\n", "content-type: application/json\r\n"
    form = "content-type: multipart/form-data; boundary=edge\r\n"
    start = b'--edge\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    block = b"x" * 2**16
    chunk, chunked = b"10000\r\n" + block + b"\r\n", "transfer-encoding: chunked\r\n"
    ways = {
        "told": Pour(DRAWINGS, kind + told, block),
        "chunked": Pour(DRAWINGS, kind + chunked, chunk),
        "form": Pour(EDITS, form + told, block, start),
        "chunked form": Pour(EDITS, form + chunked, chunk, b"%x\r\n%b\r\n" % (len(start), start)),
        "drip": Pour(DRAWINGS, kind + "content-length: 1000\r\n", b"x", pause=0.1),
    }
    figures = Figures()
    for name, pour in ways.items():
        with Watch(server, 0.01) as watch:
            status, sent, closed = pour.into(server, size)
        right = status == (408 if pour.pause else 413) and closed
        figures += [Figure(f"{name}: refused", right, least=1), Figure("MB sent", sent / 1e6)]
        figures.append(Figure("MB grown", watch.grown, most=64))
    return figures


@dataclass(frozen=True, slots=True)
class Pour:
    """A body that is sent block by block, as long as the server lets it."""

    path: str
    headers: str
    block: bytes
    start: bytes = b""
    pause: float = 0.0

    def into(self, server: Server, size: int) -> tuple[int, int, bool]:
        """(status, bytes sent, whether the server hung up in the end)."""
        told, sent, closed = b"", 0, False
        with closing(socket.create_connection(server.place, timeout=SECONDS)) as line:
            head = f"POST {self.path} HTTP/1.1\r\nhost: a\r\n{self.headers}\r\n"
            line.sendall(head.encode() + self.start)
            with suppress(OSError):
                while sent < size and not told:
                    line.sendall(self.block)
                    sent += len(self.block)
                    time.sleep(self.pause)
                    if select.select([line], [], [], 0)[0]:
                        told = line.recv(4096)
            try:
                while got := line.recv(4096):
                    told += got
                closed = True
            except OSError as error:
                closed = not isinstance(error, TimeoutError)
        return int(told.split(b" ", 2)[1]) if told.startswith(b"HTTP/") else 0, sent, closed


# who asks --------------------------------------------------------------------------------------------------


def _posted(body: dict[str, Any]) -> str:
    """A drawing's request as it goes over the line."""
    data = json.dumps(body)
    head = f"POST {DRAWINGS} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n{data}"


def _heard(answer: str) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer; 0 where there is none."""
    status, *lines = answer.partition("\r\n\r\n")[0].split("\r\n")
    return int(status.split()[1]) if status else 0, dict(line.lower().split(": ", 1) for line in lines)


def crowd(server: Server, count: int, seconds: float = 0.2) -> Figures:
    """Posts all at once, half of whose clients leave after 0.1 to 2 seconds. seconds: bound on /health."""
    rng, work = random.Random(0), SHORT | {"num_inference_steps": CAPS["steps"]}
    stays = [rng.uniform(0.1, 2.0) if number % 2 else None for number in range(count)]
    posts = [(_posted(work | {"seed": number}), stay) for number, stay in enumerate(stays)]
    before = server.settled()
    with (
        Watch(server, decoders=False) as watch,
        health(server, kept=False) as fresh,
        health(server, kept=True) as kept,
    ):
        answers = [_heard(answer) for answer in post_at_once(server, posts)]
        after = server.settled()
    counts = {name: after[name] - before[name] for name in after}
    statuses = Counter(status for status, _ in answers)
    stayed = Counter(status for (status, _), stay in zip(answers, stays, strict=True) if stay is None)
    bare = sum(status == 429 and not int(headers.get("retry-after", 0)) for status, headers in answers)
    lost = stayed.total() - stayed[200] - stayed[429]
    figures = [Figure("answered", statuses[200], least=1), Figure("refused", statuses[429])]
    figures += [Figure("refused without Retry-After", bare, most=0), Figure("lost", lost, most=0)]
    figures += [Figure("left", statuses[0] - stayed[0]), Figure("jobs", counts["accepted"])]
    figures += [Figure("ended as clients left", counts["cancelled"])]
    # one that is done in the moment in which its client leaves is no waste
    figures += [Figure("done for nobody", counts["done"] - statuses[200], most=max(1, count // 200))]
    figures += [Figure("jobs left", after["running"] + after["waiting"], most=0)]
    for name, (worst, times) in {"on a new connection": fresh, "on a kept one": kept}.items():
        figures += [Figure(f"worst /health {name}, s", worst, most=seconds), Figure("of", times)]
    return [*figures, Figure("MB grown", watch.grown, most=100)]


# where it may not go ---------------------------------------------------------------------------------------


def ssrf(server: Server, count: int) -> Figures:
    """URLs of pictures that lead inside; a listener waits there, and the server's own calls are told."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.2)
        urls = hostile.urls(count, listener.getsockname()[1])
        statuses = asyncio.run(_shown(server, urls))
        reached = 0
        with suppress(TimeoutError):
            while listener.accept():
                reached += 1
    calls = len(server.watched("socket.connect"))
    figures = [Figure("URLs", len(urls)), Figure("refused", statuses.count(400), least=len(urls))]
    return [*figures, Figure("connections", calls + reached, most=0)]


async def _shown(server: Server, urls: Sequence[str]) -> list[int]:
    """Statuses of questions about pictures behind these URLs."""
    statuses = []
    async with client(server) as to:
        for url in urls:
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
            answer = await to.post(CHAT, json={"messages": [{"role": "user", "content": parts}]})
            statuses.append(answer.status_code if is_told(answer.status_code, answer.text) else 500)
    return statuses


def _raw(server: Server, target: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """The answer to a request whose target is sent as it stands."""
    head = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    verb = "POST" if body else "GET"
    with closing(socket.create_connection(server.place, timeout=SECONDS)) as line, suppress(OSError):
        line.sendall(
            f"{verb} {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{head}"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        told = b""
        while got := line.recv(2**16):
            told += got
        return told
    return b""


def paths(server: Server, count: int) -> Figures:
    """Ways to make a server read a file: in targets, as pictures, as names of uploads."""
    canary = server.folder / "canary.png"
    canary.write_text(SECRET)
    link = server.folder / "tmp" / "link.png"
    link.symlink_to(canary)
    up = "../" * 12
    files = [str(canary), str(link), f"{up}{canary}", "/etc/passwd", f"{up}etc/passwd", "/proc/self/environ"]
    shown = hostile.sources(files)
    answers = [_raw(server, one) for one in hostile.targets(files)[: max(0, count - len(shown) - len(files))]]
    for one in files:
        headers, body = form([("prompt", b"x"), ("image", b"no picture")])
        answers.append(_raw(server, EDITS, body.replace(b"a.png", one.encode()), headers))
    statuses = asyncio.run(_shown(server, shown))
    link.unlink()
    told = sum(SECRET.encode() in answer or b"root:x:0" in answer for answer in answers)
    opened, secret = server.watched("open "), ("canary.png", "link.png", "/etc/passwd", "self/environ")
    read = sum(any(name in line for name in secret) for line in opened)
    failed = sum(b" 5" in answer[:12] for answer in answers) + len(statuses) - statuses.count(400)
    figures = [Figure("probes", len(answers) + len(statuses)), Figure("files told", told, most=0)]
    return [*figures, Figure("files read", read, most=0), Figure("failures", failed, most=0)]


# how long --------------------------------------------------------------------------------------------------


def soak(server: Server, minutes: float, slope: float = 10.0) -> Figures:
    """Everything mixed, four clients at a time; memory from the first fifth on, and what is left at the end.

    slope: megabytes an hour that memory may grow.
    """
    _mixed(server, min(0.2, minutes / 5))
    server.settled()
    files, handles = server.left_files(), server.process.num_fds()
    with Watch(server, max(0.1, minutes / 5), decoders=False) as watch:
        found = _mixed(server, minutes)
    after = server.settled()
    time.sleep(1)
    points = watch.samples[len(watch.samples) // 5 :]
    grown = _slope(points) * 3600
    figures = [Figure("minutes", minutes), Figure("requests", found.total(), least=1)]
    figures += [Figure("5xx", found[5], most=0), Figure("MB an hour", grown, most=slope)]
    figures += [Figure("MB", points[-1][1]), Figure("files left", server.left_files() - files, most=0)]
    figures += [Figure("open files more", server.process.num_fds() - handles, most=8)]
    return [*figures, Figure("jobs left", after["running"] + after["waiting"], most=0)]


def _mixed(server: Server, minutes: float) -> Counter[int]:
    """Requests by the first digit of their status, 0 for those whose client left."""
    until, found, bad = time.monotonic() + 60 * minutes, Counter[int](), hostile.bodies(10**9, seed=1)

    async def one(to: httpx.AsyncClient, rng: random.Random) -> int:
        kind = rng.randrange(6)
        if kind == 0:
            path, headers, body = next(bad)
            return (await to.post(path, headers=headers, content=body)).status_code
        if kind == 1:
            stay, body = rng.uniform(0, 0.2), SHORT | {"num_inference_steps": 50}
            return _heard(await _asked(server, _posted(body), stay))[0]
        if kind == 2:
            return (await to.post(CHAT, json=_asking("how many?", 8) | {"stream": True})).status_code
        if kind == 3:
            return (await to.get(rng.choice(("/v1/models", "/metrics", "/health")))).status_code
        return (await to.post(DRAWINGS, json=SHORT | {"stream": kind == 4, "partial_images": 2})).status_code

    async def ask(to: httpx.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < until:
            found[await one(to, rng) // 100] += 1

    async def run() -> None:
        async with client(server) as to:
            await asyncio.gather(*(ask(to, random.Random(n)) for n in range(4)))

    asyncio.run(run())
    return found


async def _asked(server: Server, post: str, stay: float) -> str:
    """The answer to a post, "" where its client left before."""
    reader, writer = await asyncio.open_connection(*server.place)
    try:
        writer.write(post.encode())
        async with asyncio.timeout(stay):
            return (await reader.read()).decode()
    except OSError:  # a time-out is one
        return ""
    finally:
        writer.transport.abort()


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares."""
    times, values = zip(*points, strict=True)
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle) ** 2 for t in times)
    return sum((t - middle) * (v - mean) for t, v in points) / max(spread, 1e-9)


# all of them -----------------------------------------------------------------------------------------------

FULL = {"throughput": 48, "latency": 30, "schemathesis": 10_000, "bodies": 10_000}
FULL |= {"crowd": 1_000, "ssrf": 300, "paths": 200}
ON_NANO = ("throughput", "latency")
URL_HOSTS = [host for host in hostile.INSIDE if host != "0177.0.0.1"]
"""Even where they may be fetched from, they are not public. The one left out is no address to httpx."""


def measure(name: str, options: argparse.Namespace) -> Figures:
    """One measurement, on a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model = Path(folder) / "tiny"
        save_checkpoint(tiny_model, tiny.checkpoint())
        model, caps = ("nano", {}) if name in ON_NANO else (str(tiny_model), CAPS)
        caps = caps | ({"url_hosts": URL_HOSTS} if name == "ssrf" else {})
        page = [] if name == "paths" else ["--no-ui"]
        with serving(model, Path(folder) / "server", *page, **caps) as server:
            if name == "soak":
                return soak(server, options.minutes)
            if name == "large":
                return large(server)
            run: Callable[[Server, int], Figures] = globals()[name]
            return run(server, max(8, round(FULL[name] * options.scale)))


def main() -> int:
    names = (*FULL, "large", "soak")
    parser = argparse.ArgumentParser(description="what the server bears")
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=", ".join(names))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of cases")
    parser.add_argument("--minutes", type=float, default=30.0, help="of soak")
    options = parser.parse_args()
    failed = 0
    for name in options.names or names:
        started = time.monotonic()
        figures = measure(name, options)
        failed += len(broken(figures))
        seconds = time.monotonic() - started
        print(f"{name}: {', '.join(map(str, figures))} [{seconds:.0f} s]", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
