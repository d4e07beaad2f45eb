"""The real server in a process of its own, watched from outside: `benchmarks.serve` asks it, this starts it.

python -m benchmarks.server fresh|kept URL     asks for /health until its input ends, prints the worst and the
                                               number of its answers' seconds
python -m benchmarks.server crowd URL          makes the posts of its input at once, prints their answers
"""

import http.client
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

SECONDS = 120.0
"""That a client waits for the server, at most."""
HOOK = """
import os, sys
def hook(event, args, told=open(os.environ["OPENBAGEL_WATCHED"], "a", buffering=1)):
    if event in ("open", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        what = args[1] if event == "socket.connect" else args[0]
        told.write(f"{event} {what!r}\\n")
sys.addaudithook(hook)
"""
"""Run by every Python of the server as it starts: tells each file opened, name looked up, address called."""


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    process: psutil.Process
    folder: Path
    """Holds `tmp`, the server's folder for temporary files, and `watched`, what HOOK tells."""

    @property
    def place(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    def megabytes(self, decoders: bool = True) -> float:
        """Resident memory of the server, and of its decoders."""
        total = 0
        for process in [self.process, *(self.process.children(recursive=True) if decoders else ())]:
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def metrics(self) -> dict[str, float]:
        """The scheduler's counts by their short names: accepted, done, cancelled, waiting, …"""
        lines = urlopen(self.url + "/metrics", timeout=60).read().decode().splitlines()
        pairs = (line.split() for line in lines if line.startswith("openbagel_") and "{" not in line)
        return {name.removeprefix("openbagel_").removesuffix("_total"): float(value) for name, value in pairs}

    def settled(self, seconds: float = 30) -> dict[str, float]:
        """The counts when no job is left, or those after so many seconds."""
        until = time.monotonic() + seconds
        while (counts := self.metrics())["running"] + counts["waiting"] and time.monotonic() < until:
            time.sleep(0.05)
        return counts

    def left_files(self) -> int:
        return sum(path.is_file() for path in (self.folder / "tmp").rglob("*"))

    def watched(self, *events: str) -> list[str]:
        """What HOOK told of these events so far."""
        lines = (self.folder / "watched").read_text().splitlines()
        return [line for line in lines if line.startswith(events)]


@contextmanager
def serving(model: str, folder: Path, *options: str, **limits: Any) -> Iterator[Server]:
    """`openbagel serve` with a model and limits; a server that does not end by itself is killed."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "tmp").mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd())]),
        "OPENBAGEL_WATCHED": str(folder / "watched"),
        "TMPDIR": str(folder / "tmp"),
    }
    caps = ["--limits", *(f"{name}={json.dumps(value)}" for name, value in limits.items())] if limits else []
    command = [sys.executable, "-m", "openbagel.cli", "serve", "--model", model, "--port", str(port)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, *options, *caps], env=env, stdout=log, stderr=log)
        try:
            server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid), folder)
            _wait(server, process)
            yield server
            process.terminate()
            process.wait(30)
        finally:
            process.kill()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        with suppress(OSError), urlopen(server.url + "/health", timeout=60):
            return
        assert process.poll() is None, (server.folder / "log").read_text()
        time.sleep(0.1)
    raise TimeoutError("the server does not start")


class Watch(Thread):
    """Samples a server's memory while a block runs. grown: megabytes from its start to the peak."""

    def __init__(self, server: Server, seconds: float = 0.05, *, decoders: bool = True) -> None:
        super().__init__(daemon=True)
        self.server, self.seconds, self.decoders, self.over = server, seconds, decoders, Event()
        self.first = self.peak = server.megabytes(decoders)
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self.over.wait(self.seconds):
            now = self.server.megabytes(self.decoders)
            self.samples.append((time.monotonic(), now))
            self.peak = max(self.peak, now)

    @property
    def grown(self) -> float:
        return self.peak - self.first

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


# clients in processes of their own, much cheaper than what they measure ------------------------------------


@contextmanager
def _apart(role: str, server: Server) -> Iterator[subprocess.Popen[str]]:
    """This module as a client of the server, when it is ready."""
    command = [sys.executable, "-m", "benchmarks.server", role, server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        yield process


@contextmanager
def health(server: Server, *, kept: bool) -> Iterator[list[float]]:
    """Asks for /health all the time; the list gets the worst seconds and how often in the end.

    kept: on one connection; else on a new one each time, as load balancers do.
    """
    found: list[float] = []
    with _apart("kept" if kept else "fresh", server) as process:
        yield found
        found += map(float, process.communicate()[0].split())


def post_at_once(server: Server, posts: Sequence[tuple[str, float | None]]) -> list[str]:
    """The answer that each post got, "" where its client left before, after so many seconds, or the server
    hung up.
    """
    with _apart("crowd", server) as process:
        return json.loads(process.communicate(json.dumps(posts))[0])


def _probe(place: tuple[str, int], kept: bool) -> None:
    over, took = Event(), list[float]()
    Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    print(flush=True)
    line = http.client.HTTPConnection(*place, timeout=60)
    while not over.wait(0.02):
        started = time.monotonic()
        line.request("GET", "/health")
        answer = line.getresponse()
        assert answer.status == 200 and answer.read()
        took.append(time.monotonic() - started)
        if not kept:
            line.close()
    print(max(took), len(took))


def _crowd(place: tuple[str, int]) -> None:
    """One thread on bare sockets: an HTTP library would take more of a shared core than the server does."""
    print(flush=True)
    posts = [(text.encode(), stay) for text, stay in json.load(sys.stdin)]
    answers, leaving = [b""] * len(posts), list[tuple[float, int]]()
    lines = [socket.socket() for _ in posts]
    with selectors.DefaultSelector() as open_lines:

        def close(number: int) -> None:
            open_lines.unregister(lines[number])
            lines[number].close()

        for number, (line, (_, stay)) in enumerate(zip(lines, posts, strict=True)):
            line.setblocking(False)
            line.connect_ex(place)
            open_lines.register(line, selectors.EVENT_WRITE, number)
            if stay is not None:
                heappush(leaving, (time.monotonic() + stay, number))
        while open_lines.get_map():
            pause = max(0.0, leaving[0][0] - time.monotonic()) if leaving else SECONDS
            for key, event in open_lines.select(pause):
                number = key.data
                with suppress(OSError):
                    if event & selectors.EVENT_WRITE:
                        lines[number].sendall(posts[number][0])
                        open_lines.modify(lines[number], selectors.EVENT_READ, number)
                        continue
                    if got := lines[number].recv(2**16):
                        answers[number] += got
                        continue
                close(number)
            while leaving and leaving[0][0] <= time.monotonic():
                number = heappop(leaving)[1]
                if lines[number].fileno() >= 0:
                    answers[number] = b""
                    close(number)
    print(json.dumps([answer.decode() for answer in answers]))


if __name__ == "__main__":
    role, address = sys.argv[1], urlsplit(sys.argv[2])
    place = str(address.hostname), int(address.port or 80)
    if role == "crowd":
        _crowd(place)
    else:
        _probe(place, role == "kept")
