"""The web page in a real Chromium, with nano on the CPU; and what it refuses."""

import asyncio
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image, ImageChops, ImageDraw

from openbagel.inference.pipeline import Bagel
from openbagel.serve.gate import Gate
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Service

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from openbagel.serve import web  # noqa: E402

CHROMIUM = Path(shutil.which("chromium") or "/usr/bin/chromium")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")
FLAGS = [
    "--no-sandbox",
    "--no-first-run",
    "--enable-unsafe-swiftshader",
    *(f"--disable-{one}" for one in QUIET),
]
SLOWEST = 60_000
needs_browser = pytest.mark.skipif(
    not CHROMIUM.exists() and not os.environ.get("OPENBAGEL_REQUIRE_BROWSER"), reason="there is no Chromium"
)
pytestmark = pytest.mark.filterwarnings("ignore:text guidance has no effect")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service(Bagel.load("nano", device="cpu"), ServerLimits(), name="nano")
    yield service
    service.worker.close()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    blocks, password = web.launch(service, server_port=free_port())
    assert password is None
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web") / "red.png"
    picture = Image.new("RGB", (64, 64), (40, 40, 40))
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=(220, 30, 30))
    picture.save(path)
    return path


class Screen:
    """A page in a browser, and what it complained about."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(SLOWEST)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.hosts.add(httpx.URL(request.url).host))
        self.page.goto(address)
        self.page.get_by_role("tab").first.wait_for()
        self.page.wait_for_function("document.querySelector('textarea[data-testid=textbox]')")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    @property
    def panel(self) -> Any:
        return self.page.locator("[role=tabpanel]:visible")

    def quick(self, points: int) -> None:
        """So many schedule points in every tab."""
        field = self.page.get_by_label("Schedule points")
        if not field.is_visible():
            self.page.get_by_text("Options", exact=True).click()
        field.fill(str(points))
        field.blur()

    def send(self, text: str, *files: Path) -> None:
        if files:
            shown = self.panel.locator(".thumbnail-item")
            many = shown.count() + len(files)
            self.panel.locator("input[type=file][multiple]").first.set_input_files(list(files))
            self.wait(lambda: shown.count() == many)
        box = self.panel.locator("textarea[data-testid=textbox]").first
        box.fill(text)
        box.press("Enter")

    def ready(self) -> None:
        """Waits until what was sent is done."""
        self.panel.locator("[data-testid=submit-button], .submit-button").first.wait_for()

    def wait(self, holds: Callable[[], Any], seconds: float = SLOWEST / 1000) -> Any:
        until = time.monotonic() + seconds
        while not (value := holds()):
            assert time.monotonic() < until
            self.page.wait_for_timeout(50)
        return value

    @property
    def bubbles(self) -> list[str]:
        """Of the conversation: texts as they are, "picture" for each picture."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('[data-testid=user], [data-testid=bot]')]
            .map(one => one.querySelector('img') ? 'picture' : one.innerText.trim())"""
        )

    def pictures(self, within: str) -> list[Image.Image]:
        found = self.page.locator(f"{within} img")
        urls = [found.nth(place).get_attribute("src") for place in range(found.count())]
        return [Image.open(io.BytesIO(httpx.get(str(url)).content)).convert("RGB") for url in urls]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def screen(browser: Any, address: str) -> Iterator[Screen]:
    screen = Screen(browser, address, viewport={"width": 1280, "height": 900})
    yield screen
    assert screen.errors == []
    assert screen.hosts == {"127.0.0.1"}


# the page in a browser --------------------------------------------------------------------------------------


@needs_browser
def test_a_conversation_of_three_turns_and_its_branches(screen: Screen, service: Service) -> None:
    screen.quick(4)
    screen.page.get_by_label("text", exact=True).check()
    screen.send("how many circles are there?")
    screen.wait(lambda: len(screen.bubbles) == 2 and screen.bubbles[1])
    screen.ready()
    screen.page.get_by_label("a picture", exact=True).check()
    screen.send("a red circle")
    screen.wait(lambda: screen.bubbles[3:] == ["picture"])
    screen.ready()
    screen.send("make the circle green")
    screen.wait(lambda: screen.bubbles[5:] == ["picture"])
    screen.ready()
    assert [screen.bubbles[place] for place in (2, 4)] == ["a red circle", "make the circle green"]
    drawn = screen.pictures("[data-testid=bot]")
    assert drawn[0].size == drawn[1].size == (64, 64) and drawn[0].tobytes() != drawn[1].tobytes()
    screen.page.get_by_label("Undo").last.click()
    screen.wait(lambda: len(screen.bubbles) == 4)
    box = screen.panel.locator("textarea[data-testid=textbox]")
    screen.wait(lambda: box.input_value() == "make the circle green")
    assert screen.page.get_by_label("Earlier versions").is_visible()
    screen.page.get_by_label("Retry").last.click()
    screen.ready()
    screen.wait(lambda: screen.bubbles[3:] == ["picture"])
    assert screen.bubbles[:3] == ["how many circles are there?", screen.bubbles[1], "a red circle"]


@needs_browser
def test_stop_acts_within_a_step(screen: Screen, service: Service) -> None:
    screen.tab("Draw")
    screen.quick(200)
    before = service.scheduler.counts["cancelled"]
    screen.send("a red circle")
    screen.wait(lambda: service.scheduler.running)
    screen.panel.locator(".stop-button").click()
    screen.wait(lambda: not service.scheduler.running)
    passes = service.bagel.engine.passes
    time.sleep(0.5)
    assert service.bagel.engine.passes == passes
    assert service.scheduler.counts["cancelled"] == before + 1
    screen.ready()


@needs_browser
def test_draws_several_sizes_and_seeds(screen: Screen) -> None:
    screen.tab("Draw")
    screen.quick(4)
    screen.page.get_by_label("Seed", exact=True).fill("7")
    screen.panel.get_by_role("spinbutton").fill("2")
    screen.send("a red circle")
    screen.page.get_by_text("Seed 8").wait_for()
    screen.page.get_by_text("Seed 7").wait_for()
    first, second = screen.pictures(".grid-container")
    assert first.size == (64, 64) and first.tobytes() != second.tobytes()
    screen.page.get_by_label("Seed", exact=True).fill("")


@needs_browser
def test_asks_and_tells_what_is_wrong_with_an_upload(screen: Screen, red: Path, tmp_path: Path) -> None:
    screen.tab("Ask")
    screen.send("what colour is the circle?", red)
    answer = screen.page.get_by_label("Answer", exact=True)
    assert screen.wait(answer.input_value) == "red"
    screen.ready()
    broken = tmp_path / "broken.png"
    broken.write_text("no picture", "utf-8")
    screen.send("what colour is the circle?", broken)
    screen.page.get_by_text("is not a picture in one of the formats").wait_for()
    screen.ready()
    screen.page.get_by_label("Seed", exact=True).fill("seven")
    screen.send("what colour is the circle?")
    screen.page.get_by_text("'seven' must be written like 42").wait_for()
    screen.page.get_by_label("Seed", exact=True).fill("")


@needs_browser
def test_films_and_walks(screen: Screen) -> None:
    screen.tab("Video")
    screen.quick(4)
    screen.send("a red circle moves right")
    screen.wait(lambda: screen.page.locator("img[src$='clip.gif']").count())
    screen.ready()
    (before,) = screen.pictures("#place")
    screen.page.get_by_role("button", name="→").click()
    screen.wait(lambda: screen.pictures("#place")[0] != before)


@needs_browser
def test_judges_drawings_of_the_world(screen: Screen) -> None:
    screen.tab("World")
    screen.quick(3)
    screen.page.get_by_role("button", name="Draw a random task").click()
    shown = screen.panel.locator(".caption-label")
    screen.wait(lambda: [one for one in shown.all_inner_texts() if one[0] in "✓✗"][3:])


@needs_browser
def test_edits_a_dropped_picture(screen: Screen, red: Path) -> None:
    screen.quick(4)
    screen.tab("Edit")
    screen.panel.locator("input[type=file]").first.set_input_files(red)
    screen.panel.locator(".image-frame img, [data-testid=detailed-image]").first.wait_for()
    screen.send("make the circle green")
    screen.wait(lambda: len(screen.pictures(".slider-wrap")) == 2)
    screen.ready()
    first, second = screen.pictures(".slider-wrap")
    with Image.open(red) as sent:
        assert sent.tobytes() in (first.tobytes(), second.tobytes()) and first.tobytes() != second.tobytes()


@needs_browser
@pytest.mark.slow  # the editor asks for a graphics card
def test_edits_what_is_painted(browser: Any, address: str, tmp_path: Path) -> None:
    Image.new("RGB", (256, 256), (40, 40, 40)).save(tmp_path / "large.png")
    screen = Screen(browser, address, viewport={"width": 1280, "height": 1000})
    screen.page.set_default_timeout(5 * SLOWEST)
    screen.quick(4)
    screen.tab("Edit")
    screen.panel.locator("input[type=file]").first.set_input_files(tmp_path / "large.png")
    screen.panel.locator(".image-frame img, [data-testid=detailed-image]").first.wait_for()
    screen.panel.get_by_label("Change only a part").check()
    place = screen.panel.locator("canvas").first
    place.wait_for()
    screen.page.wait_for_timeout(5000)
    box = place.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    screen.page.mouse.move(5, 5)
    empty = place.screenshot()

    def paints() -> bool:
        """A stroke, and whether it is to be seen: the editor may not be awake yet."""
        screen.page.mouse.move(x - 20, y)
        screen.page.mouse.down()
        screen.page.mouse.move(x + 20, y, steps=4)
        screen.page.mouse.up()
        screen.page.mouse.move(5, 5)
        screen.page.wait_for_timeout(4000)
        return place.screenshot() != empty

    screen.wait(paints, 90)
    screen.send("make the ground white")
    screen.wait(lambda: len(screen.pictures(".slider-wrap")) == 2, 240)
    first, second = screen.pictures(".slider-wrap")
    changed = ImageChops.difference(first, second).getbbox()
    assert changed and 0 < changed[0] and 0 < changed[1] and changed[2] < 256 and changed[3] < 256
    screen.page.close()


def test_what_is_decoded_by_the_gate_alone_is_never_made_anew(service: Service) -> None:
    """An update of more than a value would bring Gradio's own decoding back."""
    page = web.Page(service)
    assert not {page.photo, page.canvas} & {component for component, *_ in page.words}


@needs_browser
def test_a_narrow_screen_and_the_other_language(browser: Any, address: str) -> None:
    screen = Screen(browser, address, viewport={"width": 390, "height": 844}, locale="zh-CN")
    screen.page.get_by_role("tab", name="对话", exact=True).wait_for(state="attached")
    for name in ("对话", "绘画", "提问", "视频", "世界"):
        tab = screen.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            screen.page.locator(".overflow-menu button").first.click()
            tab = screen.page.locator(".overflow-dropdown").get_by_text(name, exact=True)
        tab.click()
        width = screen.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, name
    screen.page.get_by_role("button", name="English").click()
    screen.page.get_by_role("button", name="中文").wait_for()
    assert screen.page.get_by_label("Think first").is_visible()
    assert screen.errors == []


# what it refuses --------------------------------------------------------------------------------------------


def probes() -> list[str]:
    names = ["/etc/passwd", "/etc/hostname", "/proc/self/environ", "/root/.ssh/id_rsa", "C:\\win.ini"]
    names += [str(Path(web.__file__)), str(Path.cwd() / "pyproject.toml"), "file:///etc/passwd"]
    names += ["..%2f" * 8 + "etc/passwd", "//server/share/x.png", "\\\\server\\x.png", "~/.bashrc", "."]
    return [*names, *("../" * depth + "etc/passwd" for depth in range(1, 38))]


def test_paths_of_clients_are_never_read(address: str, service: Service, tmp_path: Path) -> None:
    """Fifty of them, through the file route and as uploads that were none."""
    secret = "root:"
    link = tmp_path / "link.png"
    link.symlink_to("/etc/passwd")
    config = httpx.get(f"{address}config").json()
    hints = {one["props"].get("placeholder"): one["id"] for one in config["components"]}
    box = next(hints[hint] for hint in hints if hint and hint.startswith("Drop pictures"))
    number = next(one["id"] for one in config["dependencies"] if box in one["inputs"])
    inputs = next(one["inputs"] for one in config["dependencies"] if one["id"] == number)
    paths = [*probes(), str(link)]
    assert len(paths) >= 50
    accepted = service.scheduler.counts["accepted"]
    for path in paths:
        answer = httpx.get(f"{address}gradio_api/file={path}")
        assert answer.status_code >= 400 and secret not in answer.text, path
        sent = {"text": "what?", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
        data = [sent if one == box else None for one in inputs]
        body = {"data": data, "fn_index": number, "session_hash": "probe"}
        answer = httpx.post(f"{address}gradio_api/queue/join", json=body)
        assert secret not in answer.text
    time.sleep(1)
    assert service.scheduler.counts["accepted"] == accepted


def apart(make: Callable[[], Any]) -> Any:
    """What a coroutine returns, in an event loop of its own: this thread has the browser's."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(lambda: asyncio.run(make())).result()


def test_what_is_not_painted_stays_as_it_was(
    service: Service, red: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strokes as the browser sends them: a transparent layer as large as the picture."""
    layer, sent = Image.new("RGBA", (64, 64)), io.BytesIO()
    ImageDraw.Draw(layer).rectangle((20, 24, 40, 40), fill=web.BRUSH)
    layer.save(sent, "PNG")
    page = web.Page(service)
    shown: dict[Any, Any] = {}

    async def run() -> None:
        given = dict.fromkeys((page.seed, page.think, page.language, *page.options.values()), "")
        given |= {page.canvas: (red.read_bytes(), [sent.getvalue()]), page.region: True, page.photo: None}
        given[page.options["num_timesteps"]] = "3"
        given[page.instruction] = {"text": "make the circle green", "files": []}
        async for updates in page.run(page.edit, given, "test"):
            shown.update(updates)
        await service.gate.close()

    monkeypatch.setattr(service, "gate", Gate(service.limits))  # each event loop has its own
    apart(run)
    before, after = (Image.open(path) for path in shown[page.slider])
    changed = ImageChops.difference(before, after).getbbox()
    assert changed and changed[0] >= 20 and changed[1] >= 24 and changed[2] <= 41 and changed[3] <= 41


def test_only_uploads_are_opened(service: Service, red: Path) -> None:
    with pytest.raises(ValueError, match="no uploaded picture"):
        apart(lambda: web.Page(service).opened(str(red)))


def test_texts_are_counted_in_tokens(service: Service) -> None:
    with pytest.raises(ValueError, match="limit of 8,192 text_tokens; send less, or begin anew"):
        web.Page(service).checked(["é" * 4000, "é" * 4000])


def test_a_key_is_asked_for_on_every_route(service: Service) -> None:
    app = web.mount(FastAPI(), service, ["secret key"])
    with TestClient(app) as client:
        routes = ("/ui/config", "/ui/gradio_api/info", "/ui/gradio_api/file=x", "/ui/gradio_api/queue/status")
        assert [client.get(route).status_code for route in routes] == [401] * len(routes)
        assert client.post("/ui/gradio_api/upload", files={"files": b"x"}).status_code == 401
        wrong = client.post("/ui/login", data={"username": "a", "password": "x"})
        assert wrong.status_code == 400
        right = client.post("/ui/login", data={"username": "a", "password": "secret key"})
        assert right.status_code == 200
        config = client.get("/ui/config").json()
        assert all(one["api_visibility"] == "private" for one in config["dependencies"])
        assert "fonts.googleapis" not in json.dumps(config)


def test_others_need_a_password(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(web.gr.Blocks, "launch", lambda self, **options: given.update(options))
    assert len(web.launch(service, share=True)[1] or "") >= 12
    assert not given["auth"]("anyone", "wrong")
    assert web.launch(service, server_name="0.0.0.0", password="mine")[1] == "mine"
    assert given["auth"]("anyone", "mine") and not given["auth"]("anyone", "")
    assert given["strict_cors"] and not given["show_error"] and not given.get("allowed_paths")
