"""Downloads from a real HTTP server that speaks as much of the Hub's language as they need."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from openbagel import cli, hub
from openbagel.dfloat11 import write_dfloat11
from openbagel.gguf_files import write_gguf
from openbagel.hub import NANO, download, find_model
from openbagel.inference.pipeline import Bagel
from openbagel.lora import Adapter, bind, bound, save_adapter
from openbagel.weights import load_checkpoint, save_checkpoint

NAME = "some/nano"
SMALL = 2**18
"""What counts as a large file, and the size of its pieces, in these tests."""


@dataclass
class Hub:
    """Revisions of one model: files by name. Every request is kept; some of them fail as told."""

    url: str = ""
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    cut_after: int | None = None
    """So many more bytes of weights are sent, then every connection breaks."""
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of every answer."""
    takes_ranges: bool = True
    sent: int = 0
    """Bytes of the files that were asked for, so far."""

    def commit(self, revision: str) -> str | None:
        by_commit = {commit_of(name): name for name in self.revisions}
        return (
            commit_of(revision)
            if revision in self.revisions
            else (revision if revision in by_commit else None)
        )

    def files(self, revision: str) -> dict[str, bytes]:
        by_commit = {commit_of(name): name for name in self.revisions}
        return self.revisions[revision if revision in self.revisions else by_commit[revision]]

    def fetched(self, suffix: str) -> list[str]:
        return [span for verb, path, span in self.requests if verb == "GET" and path.endswith(suffix)]


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@cache
def facts(name: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it: tensors are LFS files, the rest is git's."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    sha = hashlib.sha256(content).hexdigest()
    lfs = {"size": len(content), "sha256": sha, "oid": sha, "pointerSize": 130}
    return {"size": len(content), "oid": blob, "blobId": blob} | (
        {"lfs": lfs} if name.endswith(".safetensors") else {}
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.refusal is not None:
            return self.send(self.hub.refusal[0], b"{}", self.hub.refusal[1])
        if match := re.fullmatch(rf"/api/models/{NAME}(?:/revision/([^/]+))?", path):
            return self.info(match[1] or "main")
        if match := re.fullmatch(rf"/api/models/{NAME}/tree/([^/]+)", path):
            listed = [{"type": "file", "path": k} | facts(k, v) for k, v in self.hub.files(match[1]).items()]
            return self.send(200, json.dumps(listed).encode())
        if match := re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[1], match[2])
        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def info(self, revision: str) -> None:
        commit = self.hub.commit(revision)
        if commit is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": k} | facts(k, v) for k, v in self.hub.files(revision).items()]
        self.send(200, json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode())

    def resolve(self, revision: str, name: str) -> None:
        content = self.hub.files(revision)[name]
        told = facts(name, content)
        headers = {"X-Repo-Commit": self.hub.commit(revision) or "", "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{told["lfs"]["sha256"] if "lfs" in told else told["oid"]}"'
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None or not self.hub.takes_ranges:
            return self.send(200, content, headers)
        first, last = int(span[1]), int(span[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], headers)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.sent += len(content)
        left = self.hub.cut_after
        if left is not None and len(content) > 1000 and "resolve" in self.path:
            self.hub.cut_after = max(0, left - len(content))
            self.wfile.write(content[:left])
            if left < len(content):
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
            return
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with nano at "main", an empty cache, and the library pointed to both."""
    files = {path.name: path.read_bytes() for path in NANO.iterdir()}
    old = files | {"config.json": files["config.json"].replace(b"{", b"{ ", 1)}
    files |= {"pytorch_model.bin": b"\x80\x04evil", "modeling.py": b"raise SystemExit", "README.md": b"#"}
    told = Hub(revisions={"main": files, "v1": old})
    service = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": told}))
    threading.Thread(target=service.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{service.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", told.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", told.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PIECE", SMALL)
    yield told
    service.shutdown()
    service.server_close()


def same(folder: Path) -> bool:
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in NANO.iterdir())


def test_a_training_run_counts_as_what_it_wrote(tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    (run / "recipe.json").write_text("{}")
    assert find_model(run) == run
    for name in ("adapter", "checkpoint"):
        (run / name).mkdir()
        assert find_model(run) == run / name


def test_names_of_folders_stay_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "nano").mkdir(parents=True)
    assert find_model("nano") == NANO
    for path in (NAME, tmp_path, "./a/b", "/a/b", "a", "a/b/c", "~/x"):
        assert find_model(path) == Path(path)


def test_a_model_is_loaded_by_its_name_and_used_again_offline(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    bagel = Bagel.load(NAME, device="cpu")
    folder = find_model(NAME)
    assert same(folder) and folder.name == commit_of("main")
    assert {path.name for path in folder.iterdir()} == {path.name for path in NANO.iterdir()}
    assert not any(path.endswith((".bin", ".py")) for _, path, _ in server.requests)
    assert len(server.fetched("ema.safetensors")) > 10  # in pieces, once
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.requests)
    again = Bagel.load(NAME, device="cpu")
    assert len(server.requests) == before
    assert again.config == bagel.config
    with pytest.raises(ValueError, match="some/other is neither .*; unset HF_HUB_OFFLINE and run `"):
        find_model("some/other")
    with pytest.raises(ValueError, match="unset HF_HUB_OFFLINE"):
        find_model(f"{NAME}@v1")


def test_a_cut_download_goes_on_where_it_stopped(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    size = len(server.revisions["main"]["ema.safetensors"])
    server.cut_after = size // 2
    with pytest.raises(ValueError, match="is neither a folder nor a model that is whole in the cache; http"):
        download(NAME, workers=3)
    (part,) = (Path(constants.HF_HUB_CACHE)).rglob("*.part")
    arrived = part.stat().st_size
    assert 0 < arrived <= size // 2 and arrived % SMALL == 0
    server.cut_after = None
    server.requests.clear()
    assert same(download(NAME, workers=3))
    starts = [int(span.removeprefix("bytes=").split("-")[0]) for span in server.fetched("ema.safetensors")]
    assert sorted(set(starts)) == [0, *range(arrived, size, SMALL)]  # the first byte asks whether ranges work
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.part")]


def test_a_damaged_part_is_not_kept(server: Hub) -> None:
    sha = hashlib.sha256(server.revisions["main"]["ema.safetensors"]).hexdigest()
    part = Path(constants.HF_HUB_CACHE, "models--some--nano", "blobs", f"{sha}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="arrived damaged; download it again"):
        download(NAME)
    assert not part.exists()
    assert same(download(NAME))


def test_mirrors_that_send_whole_files_only(server: Hub) -> None:
    server.takes_ranges = False
    assert same(download(NAME))


def test_revisions_are_pinned(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (
        find_model(f"{NAME}@v1"),
        download(NAME, revision="v1"),
        find_model(f"{NAME}@{commit_of('v1')}"),
    ):
        assert folder.name == commit_of("v1")
        assert (folder / "config.json").read_bytes() == server.revisions["v1"]["config.json"]
    to = tmp_path / "here"
    assert cli.main(["download", NAME, "--to", str(to), "--revision", "main", "--workers", "2"]) == 0
    assert same(to) and capsys.readouterr().out.split() == [str(to)]
    assert {path.name for path in to.iterdir()} == {path.name for path in NANO.iterdir()} | {".cache"}
    server.requests.clear()
    assert cli.main(["download", NAME, "--to", str(to)]) == 0
    assert not server.fetched("ema.safetensors")


def test_adapters_come_by_name_too(server: Hub, tmp_path: Path) -> None:
    model = Bagel.load("nano", device="cpu").model
    bind(model, Adapter(rank=2), generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter")
    server.revisions["lora"] = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    bagel = Bagel.load("nano", device="cpu", lora=f"{NAME}@lora")
    assert bound(bagel.model).keys() == bound(model).keys()


def test_what_a_model_is_comes_from_its_headers(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole files, shards and DFloat11, at any revision; nothing of it stays."""

    def told(*options: str) -> str:
        server.sent = 0
        assert cli.main(["info", *options]) == 0
        return capsys.readouterr().out.replace(options[0], "nano")

    checkpoint = load_checkpoint(NANO)
    save_checkpoint(tmp_path / "shards", checkpoint, shard_bytes=3_000_000)
    write_dfloat11(tmp_path / "dfloat11", checkpoint)
    write_gguf(tmp_path / "gguf", checkpoint, "q8_0")
    for name in ("shards", "dfloat11", "gguf"):
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        server.revisions[name] = {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in paths}
    fits, whole = told("nano", "--fit", "24MB"), told("nano")
    for revision in ("", "@v1", f"@{commit_of('v1')}", "@shards", "@dfloat11", "@gguf"):
        assert told(NAME + revision, "--fit", "24MB") == fits
        assert 20_000 < server.sent < 150_000 + (revision == "@gguf") * SMALL
        assert (told(NAME + revision) == whole) is (revision not in ("@dfloat11", "@gguf"))
    with pytest.raises(ValueError, match="nor a model that is whole in the cache"):
        find_model(NAME, cached=True)
    server.takes_ranges = False
    assert told(NAME, "--fit", "24MB") == fits
    server.takes_ranges = True
    folder = download(NAME)
    for setting, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch, hub.outlined(NAME) as found:
            assert found != folder
            patch.setattr(constants, setting, value)
            assert told(NAME, "--fit", "24MB") == fits and server.sent == 0


def test_hostile_headers_are_bounded(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    files = server.revisions["main"]
    long = (2**60).to_bytes(8, "little") + bytes(3 * SMALL)
    server.revisions["long"] = files | {"ema.safetensors": long, "../../evil.safetensors": bytes(9)}
    assert cli.main(["info", f"{NAME}@long", "--fit", "24MB"]) == 2
    assert "is no complete safetensors file" in capsys.readouterr().err
    assert not [path for _, path, _ in server.requests if "evil" in path]
    server.refusal = REFUSALS["gated"][0]
    assert cli.main(["info", NAME, "--fit", "24MB"]) == 2
    assert "is gated" in capsys.readouterr().err


REFUSALS = {
    "no such repository": ((404, {"X-Error-Code": "RepoNotFound"}), "neither a folder nor a public model"),
    "private": ((401, {"X-Error-Code": "RepoNotFound"}), "hf auth login"),
    "gated": ((403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its terms there"),
    "wrong token": (
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "401.*check network, token",
    ),
    "broken": ((400, {}), "failed .*Bad request"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals_are_told_in_one_line(
    server: Hub, refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal, told = REFUSALS[refusal]
    with pytest.raises(ValueError, match=told) as caught:
        Bagel.load(NAME)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()  # a folder that holds something is no excuse
    assert cli.main(["download", NAME, "--to", str(tmp_path / "full")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line)


def test_other_faults_are_told_in_one_line(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"has no revision 'v9': name a branch, tag or commit"):
        download(NAME, revision="v9")
    with pytest.raises(ValueError, match="max_workers"):
        download(NAME, workers=0)
    server.revisions["pickles"] = {"pytorch_model.bin": b"\x80", "config.json": b"{}"}
    with pytest.raises(ValueError, match="neither safetensors nor GGUF weights"):
        download(NAME, revision="pickles")
    with pytest.raises(ValueError, match="neither a folder nor .* check network"):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        download(NAME)
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]


def test_missing_space_is_counted_before_anything_is_fetched(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in NANO.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 10_000_000))
    with pytest.raises(ValueError, match=rf"{size / 1e9:.2f} GB needed, .* 0.01 GB missing; free them"):
        download(NAME, to=tmp_path / "new" / "folder")
    assert not server.fetched("safetensors") and not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    assert same(download(NAME, to=tmp_path / "new" / "folder"))


def test_without_network_the_cache_is_used(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download(NAME) == folder


def test_the_environment_decides(server: Hub, tmp_path: Path) -> None:
    """As a user has it: a mirror, a home, and later no network, for the command itself."""
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "openbagel.cli"]
    for verb, offline in (("download", "0"), ("info", "1")):
        env["HF_HUB_OFFLINE"] = offline
        done = subprocess.run([*command, verb, NAME], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert same(next((tmp_path / "home").rglob(commit_of("main"))))
