"""The real server in a process of its own, watched from outside: `benchmarks.serve` asks it, this starts it.

python -m benchmarks.server http://127.0.0.1:8000     asks for /health until its input ends, prints
                                                      the worst and the number of its answers' seconds
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil

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


@contextmanager
def health(server: Server) -> Iterator[list[float]]:
    """Asks for /health all the time from another process; the list gets the worst seconds and how often."""
    found: list[float] = []
    command = [sys.executable, "-m", "benchmarks.server", server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as poller:
        assert poller.stdout and poller.stdin
        poller.stdout.readline()
        yield found
        found += map(float, poller.communicate()[0].split())


def _poll(url: str) -> None:
    """One connection, as a load balancer's; a new one where it was closed."""
    over, took = Event(), list[float]()
    Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    print(flush=True)
    while not over.wait(0.02):
        started = time.monotonic()
        with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)) as line:
            line.request("GET", "/health")
            assert line.getresponse().status == 200
        took.append(time.monotonic() - started)
    print(max(took), len(took))


if __name__ == "__main__":
    _poll(sys.argv[1])
