"""What benchmarks/serve.py measures at length, in short: a real server under what strangers do to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serve
from benchmarks.server import HOOK, Server, serving
from openbagel.weights import save_checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("robust")
    save_checkpoint(folder / "tiny", tiny.checkpoint())
    caps = serve.CAPS | {"url_hosts": serve.URL_HOSTS, "queue": 8, "key_queue": 8, "running": 4}
    with serving(str(folder / "tiny"), folder / "server", "--no-ui", **caps) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After each test it is the same process, and no job is left."""
    yield
    counts = server.settled()
    assert server.process.is_running() and counts["running"] + counts["waiting"] == 0


def keeps(figures: serve.Figures) -> None:
    assert not serve.broken(figures), ", ".join(map(str, figures))


def test_no_body_breaks_it(server: Server):
    keeps(serve.bodies(server, 120))


def test_no_case_of_its_schema_breaks_it(server: Server):
    keeps(serve.schemathesis(server, 60))


def test_large_bodies_take_no_memory(server: Server):
    keeps(serve.large(server))


def test_a_crowd_is_served_or_refused(server: Server):
    """The bound on /health leaves room for the clients, which share the core with the server here."""
    figures = serve.crowd(server, 120, seconds=2.0)
    keeps(figures)
    found = {figure.name: figure.value for figure in figures}
    assert found["refused"] and found["jobs"] <= 120


def test_no_url_leads_inside(server: Server):
    keeps(serve.ssrf(server, 100))


def test_no_path_is_read(server: Server):
    keeps(serve.paths(server, 100))


def test_nothing_piles_up(server: Server):
    """A few seconds tell no slope; what leaks with every request shows all the same."""
    keeps(serve.soak(server, minutes=0.1, slope=6000))


def test_a_figure_out_of_bounds_is_told():
    figures = [serve.Figure("a", 1, most=0), serve.Figure("b", 1, least=1)]
    assert serve.broken(figures) == ["a 1 (out of bounds: -inf to 0)"]


def test_the_watcher_sees_files_and_calls(tmp_path: Path):
    """Or the tests above would prove nothing."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    code = "import socket; open('/dev/null'); socket.socket().connect_ex(('127.0.0.1', 1))"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OPENBAGEL_WATCHED": str(tmp_path / "watched")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    told = (tmp_path / "watched").read_text()
    assert "open '/dev/null'" in told and "socket.connect ('127.0.0.1', 1)" in told
