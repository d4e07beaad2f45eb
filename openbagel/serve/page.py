"""What every part of the web page stands on: words in two languages, choices, and runs of requests.

    component ──sent──▶ plan: (requests, show) ──▶ events of the requests ──grown──▶ show(made) ──▶ updates

A run is an async generator; stopping it, or leaving the page, closes it, and that cancels its requests before
their next forward. Pictures that users send pass the gate, never Gradio's own decoding.
"""

import asyncio
import html
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import gradio as gr
import yaml
from gradio.themes import Default
from gradio.utils import get_upload_folder
from PIL import Image

from openbagel.checks import retold
from openbagel.config import GUIDANCE_OPTIONS, Sampling, adjusted
from openbagel.inference.engine import Request
from openbagel.inference.events import Picture, Text, Thought
from openbagel.inference.pipeline import Bagel
from openbagel.picture_files import save_picture
from openbagel.serve.errors import told
from openbagel.serve.service import Draft, Service

ASSETS = Path(__file__).parents[1] / "assets"
WORDS: dict[str, str] = yaml.safe_load((ASSETS / "words.yaml").read_text("utf-8"))
LANGUAGES = ("en", "zh")
DRAFTS = 8
WRITING = ("max_tokens", "max_think_tokens", "temperature", "top_p", "top_k")
"""Options of texts."""
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
HIDDEN: dict[str, Any] = {"queue": False, **QUIET}
PIXELS = "img, canvas { image-rendering: pixelated; } .message img { min-width: 192px; }"
"""For models whose pictures are small."""


@dataclass(slots=True)
class Message:
    """A part of a conversation, or of what a request made; note: what stands under a picture."""

    role: str
    content: str | Image.Image
    is_thought: bool = False
    is_draft: bool = False
    note: str = ""
    file: str = ""
    """Where the browser finds the picture."""

    def path(self) -> str:
        """The picture's file, which carries its seed and options; written anew when it was cleared away."""
        if not (self.file and Path(self.file).exists()):
            self.file = new_file("picture.png")
            save_picture(self.content, Path(self.file))  # pyright: ignore[reportArgumentType]
        return self.file

    def bubble(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else {"path": self.path()}
        metadata = {"title": "💭"} if self.is_thought else {}
        return {"role": self.role, "content": content, "metadata": metadata}


@dataclass(frozen=True, slots=True)
class Wish:
    """What was sent, by component, and what goes with every request."""

    given: dict[Any, Any]
    bagel: Bagel
    seed: int
    think: bool


Updates = dict[Any, Any]
Begin = Callable[[], Request[Any]]
Show = Callable[[list[list[Message]]], Updates]
"""Of what each request has made so far."""
Plan = Callable[[Wish], Awaitable[tuple[Sequence[Begin], Show]]]


class Bench:
    """Components that know the language, and plans that run on a service."""

    def __init__(self, service: Service) -> None:
        self.service, self.limits, self.config = service, service.limits, service.bagel.config
        self.settings = self.config.settings
        self.sizes = self._sizes()
        self.words: list[tuple[Any, dict[str, str], list[str]]] = []

    def appearance(self) -> dict[str, Any]:
        """What Gradio is told when it serves the page: no files, nothing from other machines, no extras."""
        fonts: Updates = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
        theme = Default(primary_hue="orange", neutral_hue="stone", radius_size="lg", **fonts)
        css = (ASSETS / "page.css").read_text("utf-8") + PIXELS * (max(self.settings.size) < 256)
        options = dict.fromkeys(("run_history", "ssr_mode", "mcp_server", "enable_monitoring"), False)
        options |= {"theme": theme, "css": css, "footer_links": [], "show_error": False}
        return options | {"max_file_size": self.limits.body_bytes}

    # words ------------------------------------------------------------------------------------------------

    def put(self, kind: Any, key: str, *, choices: Sequence[str] = (), **options: Any) -> Any:
        """A component whose label, placeholder and choices follow the language."""
        place = {gr.Button: "value", gr.Chatbot: "placeholder"}.get(kind, "label")
        keys = {place: key} if key in WORDS else {}
        keys |= {"placeholder": f"{key}_hint"} if f"{key}_hint" in WORDS else {}
        made = kind(**_worded(keys, choices, LANGUAGES[0]), **options)
        self.words.append((made, keys, list(choices)))
        return made

    def switched(self, language: str) -> list[Any]:
        other = LANGUAGES[language == LANGUAGES[0]]
        return [other, *(gr.update(**_worded(keys, choices, other)) for _, keys, choices in self.words)]

    def greeted(self, request: gr.Request) -> list[Any]:
        """The first language is the browser's."""
        is_chinese = request.headers.get("accept-language", "").startswith(LANGUAGES[1])
        return self.switched(LANGUAGES[0]) if is_chinese else [gr.skip()] * (len(self.words) + 1)

    # what goes with every request -------------------------------------------------------------------------

    def knobs(self) -> None:
        """Seed, thinking and options, below the tabs; empty ones are the model's own for each task."""
        self.language = gr.State(LANGUAGES[0])
        with gr.Column(elem_classes="last"):
            with self.put(gr.Accordion, "thought", open=False, visible=False) as self.fold:
                self.thought = gr.Textbox(show_label=False, container=False, interactive=False, lines=2)
            with gr.Row(equal_height=True):
                self.seed = self.put(gr.Textbox, "seed", max_lines=1, min_width=100)
                self.used = self.put(gr.Textbox, "used_seed", interactive=False, max_lines=1, min_width=100)
                self.think = self.put(gr.Checkbox, "think", min_width=100)
            with self.put(gr.Accordion, "options", open=False), gr.Row():
                draw, guided = self.settings.draw, self.settings.draw.guidance
                self.own = {one.name: getattr(draw, one.name) for one in fields(Sampling)}
                self.own |= {name: getattr(self.settings.ask, name) for name in WRITING}
                self.own |= {name: getattr(guided, inner) for name, inner in GUIDANCE_OPTIONS.items()}
                del self.own["guidance"], self.own["negative_prompt"]
                self.options = {name: self._option(name, value) for name, value in self.own.items()}

    def _option(self, name: str, own: Any) -> Any:
        if isinstance(own, bool):
            return self.put(gr.Checkbox, name, value=own, min_width=200)
        if isinstance(own, Enum):
            return self.put(gr.Dropdown, name, choices=["", *map(str, type(own))], value="", min_width=200)
        return self.put(gr.Textbox, name, placeholder=_written(own), max_lines=1, min_width=200)

    def chosen(self, given: Updates) -> Wish:
        """The model with the options that were asked for, in each task's own sampling."""
        asked = {name: _read(name, given[one], self.own[name]) for name, one in self.options.items()}
        self.limits.check(steps=(asked["num_timesteps"] or 1) - 1)
        for name in ("max_tokens", "max_think_tokens"):
            self.limits.check(tokens=asked[name])
        tasks = {name: getattr(self.settings, name) for name in ("draw", "edit", "ask", "film")}
        samplings = {name: adjusted(own, asked) for name, own in tasks.items() if own}
        bagel = self.service.bagel.with_settings(replace(self.settings, **samplings))
        seed = _read("seed", given[self.seed], 42)
        return Wish(given, bagel, secrets.randbelow(2**31) if seed is None else seed, bool(given[self.think]))

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """What the model can draw and the limits allow, as large as its own size."""
        (height, width), stride, sizes = self.settings.size, self.config.latent_stride, {}
        for across, down in ((width, height), *RATIOS):
            side = (height * width / (across * down)) ** 0.5
            h, w = (max(1, round(side * part / stride)) * stride for part in (down, across))
            with suppress(ValueError):
                self.service.bagel.pictures.grid_of((h, w))
                sizes |= {f"{w} × {h}": (h, w)} if h * w <= self.limits.output_pixels else {}
        return sizes

    async def parts(self, sent: dict[str, Any] | None) -> list[Any]:
        """Pictures, then the text, of a message box."""
        files, text = (sent or {}).get("files", []), ((sent or {}).get("text") or "").strip()
        self.checked([*files, text])
        return [*[await self.opened(file) for file in files], *([text] if text else [])]

    async def opened(self, sent: Any) -> Image.Image:
        """A picture out of bytes, or out of a file that was uploaded and of no other."""
        if not isinstance(sent, bytes):
            path = Path(getattr(sent, "path", sent)).resolve()
            if not (path.is_relative_to(Path(get_upload_folder()).resolve()) and path.is_file()):
                raise ValueError("this is no uploaded picture; drop it again")
            sent = await asyncio.to_thread(path.read_bytes)
        if len(sent) > self.limits.body_bytes:
            raise ValueError(f"the picture is larger than {self.limits.body_bytes:,} bytes; make it smaller")
        return await self.service.gate.open(sent)

    def checked(self, parts: list[Any]) -> list[Any]:
        """Parts, if they are within the limits."""
        with retold("{error}; send less, or begin anew", ValueError):
            self.service.check_heard(parts)
        if not parts:
            raise ValueError("nothing was said or shown; write something or drop a picture")
        return parts

    # runs -------------------------------------------------------------------------------------------------

    async def together(self, begins: Sequence[Begin], key: str) -> AsyncGenerator[tuple[int, Any]]:
        """The events of several requests as they come, each with its request's number."""
        inbox = asyncio.Queue[Any]()

        async def listen(number: int, begin: Begin) -> None:
            async for event in self.service.events(begin, key=key, drafts=DRAFTS):
                inbox.put_nowait((number, event))

        tasks = [asyncio.create_task(listen(*one)) for one in enumerate(begins)]
        ended = asyncio.gather(*tasks)
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())
        ended.add_done_callback(lambda _: inbox.put_nowait(None))
        try:
            while (item := await inbox.get()) is not None:
                yield item
            ended.result()
        finally:
            for task in tasks:
                task.cancel()

    async def run(self, plan: Plan, given: Updates, key: str) -> AsyncGenerator[Updates]:
        wish = self.chosen(given)
        begins, show = await plan(wish)
        made = [list[Message]() for _ in begins]
        yield show(made)
        async with aclosing(self.together(begins, key)) as events:
            async for number, event in events:
                before, made[number] = made[number], _grown(made[number], event)
                if made[number] is not before:
                    thought = "".join(str(one.content) for one in made[0] if one.is_thought)
                    fold = {self.fold: gr.update(visible=bool(thought)), self.thought: thought}
                    yield {self.used: str(wish.seed)} | fold | show(made)

    def on(self, trigger: Any, plan: Plan, inputs: set[Any], outputs: list[Any], box: Any = None) -> Any:
        """Lets a trigger run a plan. A message box then shows a button to stop it."""

        async def guarded(given: dict, request: gr.Request) -> AsyncGenerator[Updates]:
            try:
                async with aclosing(self.run(plan, given, f"ui {request.session_hash}")) as run:
                    async for updates in run:
                        yield updates
            except Exception as error:
                line = html.escape(told(error)[1]["error"]["message"])
                raise gr.Error(line, duration=12, print_exception=False) from error

        inputs = {*inputs, self.seed, self.think, self.language, *self.options.values()}
        outputs = [*outputs, self.used, self.fold, self.thought]
        if not box:
            return trigger(guarded, inputs, outputs, **QUIET)
        run = trigger(lambda: _busy(True), None, box, **HIDDEN).then(guarded, inputs, outputs, **QUIET)
        for ended in (run.then, run.failure):  # the one does not follow errors
            ended(lambda: _busy(False), None, box, **HIDDEN)
        return box.stop(lambda: _busy(False), None, box, cancels=[run], **HIDDEN)

    def box(self, key: str) -> Any:
        """A box for a text and pictures."""
        options = {"file_types": ["image"], "file_count": "multiple", "sources": ["upload"]}
        long = self.limits.texts
        return self.put(gr.MultimodalTextbox, key, show_label=False, max_plain_text_length=long, **options)


def say(key: str, language: str) -> str:
    """The words for a key; what has none is its own name."""
    return WORDS[key].split(" | ")[LANGUAGES.index(language)] if key in WORDS else key


def _worded(keys: dict[str, str], choices: Sequence[str], language: str) -> Updates:
    worded: Updates = {place: say(key, language) for place, key in keys.items()}
    return worded | ({"choices": [(say(one, language), one) for one in choices]} if choices else {})


def _busy(busy: bool) -> Any:
    return gr.update(submit_btn=not busy, stop_btn=busy)


def _grown(made: list[Message], event: Any) -> list[Message]:
    """What a request has made so far, with an event."""
    last = made[-1] if made else None
    if isinstance(event, Draft | Picture):
        note = f"{event.step} / {event.steps}" if isinstance(event, Draft) else ""
        picture = Message("assistant", event.picture, is_draft=isinstance(event, Draft), note=note)
        return [*(made[:-1] if last and last.is_draft else made), picture]
    if not isinstance(event, Text | Thought):
        return made
    thinks = isinstance(event, Thought)
    if last and isinstance(last.content, str) and last.is_thought == thinks:
        return [*made[:-1], replace(last, content=last.content + event.text)]
    return [*made, Message("assistant", event.text, is_thought=thinks)]


def _written(own: Any) -> str:
    return " ".join(map(str, own)) if isinstance(own, tuple) else str(own)


def _read(name: str, given: Any, own: Any) -> Any:
    """An option as its own value's type; None where nothing is given."""
    if not isinstance(given, str) or isinstance(own, Enum):
        return given or None
    with retold(f"{name} {given!r} must be written like {_written(own)}", ValueError):
        kinds = list(map(type, own)) if isinstance(own, tuple) else [type(own)]
        read = tuple(kind(word) for kind, word in zip(kinds, given.split(), strict=True)) if given else None
    return read if isinstance(own, tuple) or not read else read[0]


def new_file(name: str) -> str:
    return str(Path(get_upload_folder(), secrets.token_hex(16), name))
