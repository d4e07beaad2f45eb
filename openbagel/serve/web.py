"""The web page: chat, draw, edit, ask, video and the toy world, all on the requests of one service.

A conversation lives in the session on this side: the browser's copy is not read.
"""

import html
import random
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image, ImageChops

from openbagel.picture_files import clip_writer
from openbagel.serve.page import HIDDEN, Begin, Bench, Message, Show, Updates, Wish, new_file, say
from openbagel.serve.service import Service
from openbagel.world.exercise import Draws, Said, Shown
from openbagel.world.judge import judge
from openbagel.world.rows import as_heard
from openbagel.world.samples import world_named
from openbagel.world.tasks import TASKS, example

VERSIONS = 16
"""Earlier versions of a conversation that are kept."""
MOST_FRAMES = 32
MAP_KEYS = ("go left", "go up", "go down", "go right", "zoom in", "zoom out")
MOVES = 2
"""Moves that the next one is drawn after: longer walks were not learned."""
BRUSH = "#ff2d78"
GALLERY = {"columns": 2, "height": "auto", "object_fit": "contain", "format": "png", "interactive": False}


class Page(Bench):
    """The page's components, and what they do."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.world = world_named(self.settings.world) if self.settings.world else None
        with gr.Blocks(title="openbagel", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            with gr.Row(equal_height=True):
                gr.Markdown(f"## openbagel `{html.escape(service.name)}`", elem_classes="head")
                switch = self.put(gr.Button, "other_language", size="sm", elem_classes="slim")
            self.knobs()
            tabs = [self._chat, *([self._draw, self._edit] if self.sizes else []), self._ask]
            tabs += [self._video] if self.sizes else []
            tabs += [self._world] if self.sizes and self.world else []
            with gr.Tabs():
                for tab in tabs:
                    with self.put(gr.Tab, tab.__name__[1:]):
                        tab()
            outputs = [self.language, *(component for component, *_ in self.words)]
            switch.click(self.switched, self.language, outputs, **HIDDEN)
            self.blocks.load(self.greeted, None, outputs, **HIDDEN)
        at_once = self.limits.running
        self.blocks.queue(max_size=self.limits.queue, default_concurrency_limit=at_once, api_open=False)

    # chat -------------------------------------------------------------------------------------------------

    def _chat(self) -> None:
        replies = ["auto"] * self.settings.draws_by_itself + ["text", "image"]
        self.talk, self.past = gr.State([]), gr.State([])
        options = {"show_label": False, "height": "min(54vh, 600px)", "editable": "user", "buttons": []}
        self.chatbot = self.put(gr.Chatbot, "welcome", **options)
        self.message = self.box("message")
        with gr.Row(equal_height=True):
            choices = replies if self.sizes else ["text"]
            self.reply = self.put(gr.Radio, "reply", choices=choices, value=choices[0], min_width=380)
            options = {"minimum": 1, "maximum": 16, "step": 1, "value": 1, "visible": choices[0] == "auto"}
            self.most = self.put(gr.Slider, "most", min_width=120, **options)
            self.earlier = self.put(gr.Dropdown, "earlier", type="index", visible=False, min_width=160)
            fresh = self.put(gr.Button, "fresh", size="sm", elem_classes="slim")
        outputs = [self.talk, self.past, self.chatbot, self.earlier, self.message]
        before = {"inputs": [self.talk, self.past], "outputs": outputs, **HIDDEN}
        inputs = {self.talk, self.reply, self.most}
        self.on(self.message.submit, self.chat, {self.message, *inputs}, outputs, self.message)
        for event, cut in ((self.chatbot.retry, self.retried), (self.chatbot.edit, self.edited)):
            self.on(event(cut, **before).then, self.chat, inputs, outputs, self.message)
        self.chatbot.undo(self.undone, **before)
        for event in (fresh.click, self.chatbot.clear):
            event(lambda talk, past: self.turned([], talk, past), **before)
        before |= {"inputs": [self.talk, self.past, self.earlier]}
        self.earlier.input(lambda talk, past, one: self.turned(past[one], talk, past), **before)

    async def chat(self, wish: Wish) -> tuple[list[Begin], Show]:
        """What the model says and draws after all that was said and shown."""
        said = [Message("user", part) for part in await self.parts(wish.given.get(self.message))]
        talk = [*wish.given[self.talk], *said]
        parts = self.checked([one.content for one in talk if not one.is_thought])
        options = {"reply": wish.given[self.reply], "size": None, "seed": wish.seed, "think": wish.think}
        options["max_parts"] = int(wish.given[self.most])

        def show(made: list[list[Message]]) -> Updates:
            cleared = {self.message: gr.update(value=None)} if said and not made[0] else {}
            return self.told([*talk, *made[0]]) | {self.fold: gr.update(visible=False)} | cleared

        return [partial(wish.bagel.chat_request, parts, **options)], show

    def told(self, talk: Sequence[Message]) -> Updates:
        kept = [one for one in talk if not one.is_draft]
        return {self.chatbot: [one.bubble() for one in talk], self.talk: kept}

    def turned(self, talk: list[Message], before: list[Message], past: list[list[Message]]) -> Updates:
        """Goes on from another version of the conversation; the one before is kept."""
        past = [*past, before][-VERSIONS:] if before and before != talk else past
        names = [f"{number}: {_last_words(one)}" for number, one in enumerate(past, 1)]
        earlier = gr.update(choices=names, value=None, visible=bool(past))
        return self.told(talk) | {self.past: past, self.earlier: earlier}

    def retried(self, talk: list[Message], past: list[Any], event: gr.RetryData) -> Updates:
        return self.turned(talk[: _turn(talk, event.index)[1]], talk, past)

    def undone(self, talk: list[Message], past: list[Any], event: gr.UndoData) -> Updates:
        """Takes a turn back into the message box."""
        start, end = _turn(talk, event.index)
        text = " ".join(one.content for one in talk[start:end] if isinstance(one.content, str))
        files = [one.file for one in talk[start:end] if one.file and Path(one.file).exists()]
        return self.turned(talk[:start], talk, past) | {self.message: {"text": text, "files": files}}

    def edited(self, talk: list[Message], past: list[Any], event: gr.EditData) -> Updates:
        """Branches: the words of a turn are others, its pictures stay."""
        start, end = _turn(talk, event.index)
        shown = [one for one in talk[start:end] if not isinstance(one.content, str)]
        return self.turned([*talk[:start], *shown, Message("user", str(event.value))], talk, past)

    # draw, edit, ask --------------------------------------------------------------------------------------

    def _draw(self) -> None:
        with gr.Row():
            with gr.Column():
                self.prompt = self.box("prompt")
                self.negative = self.put(gr.Textbox, "negative_prompt", max_lines=4)
                labels, most = list(self.sizes), self.limits.n
                with gr.Row():
                    self.size = self.put(gr.Dropdown, "size", choices=labels, value=labels[0], min_width=130)
                    self.count = self.put(gr.Slider, "count", minimum=1, maximum=most, step=1, min_width=130)
            with gr.Column():
                self.gallery = self.put(gr.Gallery, "pictures", **GALLERY)
        inputs = {self.prompt, self.negative, self.size, self.count}
        self.on(self.prompt.submit, self.draw, inputs, [self.gallery], self.prompt)

    async def draw(self, wish: Wish) -> tuple[list[Begin], Show]:
        given, settings = wish.given, wish.bagel.config.settings
        parts = self.checked(await self.parts(given[self.prompt]))
        sampling = settings.draw if all(isinstance(part, str) for part in parts) else settings.edit
        sampling = replace(sampling, negative_prompt=given[self.negative])
        options = {"size": self.sizes[given[self.size]], "think": wish.think, "sampling": sampling}
        seeds = range(wish.seed, wish.seed + int(given[self.count]))
        begins = [partial(wish.bagel.draw_request, parts, seed=seed, **options) for seed in seeds]
        seed = say("seed", given[self.language])
        return begins, _shown_in(self.gallery, lambda picture: f"{seed} {picture.info['seed']}")

    def _edit(self) -> None:
        with gr.Row():
            with gr.Column():
                options: dict[str, Any] = {"sources": ("upload", "clipboard"), "format": "png", "height": 400}
                options |= {"show_label": False}
                with gr.Column() as self.whole:
                    self.photo = gr.Image(type="filepath", buttons=[], **options)
                brush = gr.Brush(default_size="auto", colors=[BRUSH], default_color=BRUSH, color_mode="fixed")
                options |= {"layers": False, "transforms": (), "brush": brush}
                with gr.Column(visible=False) as self.part:
                    self.canvas = gr.ImageEditor(**options)
                self.region = self.put(gr.Checkbox, "region")
                self.instruction = self.box("instruction")
            with gr.Column():
                options = {"format": "png", "height": 400, "buttons": []}
                self.slider = self.put(gr.ImageSlider, "before_after", **options)
        # Gradio would decode what is sent. It makes components anew when an update changes more than their
        # value, so these two have no words of their own, and it is columns that come and go.
        self.photo.preprocess = lambda payload: payload and payload.path
        self.canvas.preprocess = partial(_as_sent, self.canvas.blob_storage)
        outputs = [self.whole, self.part, self.canvas]
        self.region.input(self.painted, [self.region, self.photo], outputs, **HIDDEN)
        inputs = {self.photo, self.region, self.canvas, self.instruction}
        self.on(self.instruction.submit, self.edit, inputs, [self.slider], self.instruction)

    async def painted(self, region: bool, photo: str | None) -> tuple[Any, ...]:
        """Brings the picture to the editor, which browsers without a graphics card are slow with, or back."""
        background = await self.opened(photo) if region and photo else None
        value = {"background": background, "layers": [], "composite": None} if background else None
        return gr.update(visible=not region), gr.update(visible=region), value

    async def edit(self, wish: Wish) -> tuple[list[Begin], Show]:
        """Outside of what is painted a picture stays as it is, pixel for pixel."""
        given = wish.given
        background, layers = (
            given[self.canvas] or (None, []) if given[self.region] else (given[self.photo], [])
        )
        if background is None:
            raise ValueError("nothing to edit; drop a picture")
        before = await self.opened(background)
        shown, mask = Message("user", before), Image.new("L", before.size)
        for layer in filter(None, layers):
            strokes = await self.opened(layer)  # laid on white
            painted = ImageChops.difference(strokes, Image.new("RGB", strokes.size, "white")).convert("L")
            mask = painted.point([0] * 9 + [255] * 247).resize(before.size, Image.Resampling.NEAREST)
        parts = self.checked([before, *await self.parts(given[self.instruction])])
        options = {"size": None, "seed": wish.seed, "think": wish.think}
        options |= {"sampling": wish.bagel.config.settings.edit}

        def show(made: list[list[Message]]) -> Updates:
            if not (drawn := _pictures(made)):
                return {self.slider: (shown.path(), shown.path())}
            after = drawn[-1].content
            if mask.getbbox():
                after = after.resize(before.size, Image.Resampling.BICUBIC)
                after = Image.composite(after, before, mask)
            return {self.slider: (shown.path(), Message("assistant", after).path())}

        return [partial(wish.bagel.draw_request, parts, **options)], show

    def _ask(self) -> None:
        self.question = self.box("question")
        self.answer = self.put(gr.Textbox, "answer", lines=5, max_lines=24, interactive=False)
        self.on(self.question.submit, self.ask, {self.question}, [self.answer], self.question)

    async def ask(self, wish: Wish) -> tuple[list[Begin], Show]:
        parts = self.checked(await self.parts(wish.given[self.question]))

        def show(made: list[list[Message]]) -> Updates:
            return {self.answer: "".join(str(one.content) for one in made[0] if not one.is_thought)}

        return [partial(wish.bagel.write_request, parts, seed=wish.seed, think=wish.think)], show

    # video ------------------------------------------------------------------------------------------------

    def _video(self) -> None:
        with gr.Row():
            with gr.Column():
                self.scene = self.box("film")
                self.frames = self.put(gr.Slider, "frames", minimum=1, maximum=MOST_FRAMES, step=1, value=10)
            self.clip = self.put(gr.Image, "clip", interactive=False, height=300, format="png", buttons=[])
        self.on(self.scene.submit, self.film, {self.scene, self.frames}, [self.clip], self.scene)
        if self.world:
            self._walk()

    async def film(self, wish: Wish) -> tuple[list[Begin], Show]:
        parts = self.checked(await self.parts(wish.given[self.scene]))
        given = [part for part in parts if not isinstance(part, str)]
        count = int(wish.given[self.frames])
        options = {"num_frames": count, "seed": wish.seed}

        def show(made: list[list[Message]]) -> Updates:
            drawn = [one.content for one in _pictures(made)]
            if len(drawn) < count or _pictures(made)[-1].is_draft:
                return {self.clip: _pictures(made)[-1].path() if drawn else None}
            path = new_file("clip.gif")
            clip_writer(Path(path), fps=4)([*(one.resize(drawn[0].size) for one in given), *drawn])
            return {self.clip: path}

        return [partial(wish.bagel.film_request, parts, **options)], show

    def _walk(self) -> None:
        self.views = gr.State([])
        with self.put(gr.Accordion, "walk", open=True), gr.Row():
            self.place = self.put(
                gr.Image, "place", elem_id="place", interactive=False, height=300, format="png", buttons=[]
            )
            with gr.Column(elem_classes="arrows"):
                new = self.put(gr.Button, "new_map", size="sm")
                with gr.Row():
                    actions = {action: self.put(gr.Button, action, min_width=48) for action in MAP_KEYS}
        for action, button in actions.items():
            self.on(button.click, partial(self.walk, action), {self.views}, [self.place, self.views])
        for trigger in (self.blocks.load, new.click):
            trigger(self.arrived, None, [self.place, self.views], **HIDDEN)

    def arrived(self) -> tuple[Any, list[Any]]:
        """The first view of a new map."""
        assert self.world
        start = example(self.world, secrets.randbelow(2**31), 0, "walk_map").steps[0]
        assert isinstance(start, Shown)
        view = as_heard(start, self.world.side)
        return view, [view]

    async def walk(self, action: str, wish: Wish) -> tuple[list[Begin], Show]:
        heard = [*wish.given[self.views][-2 * MOVES - 1 :], action]
        options = {"reply": "image", "size": None, "seed": wish.seed, "think": False}

        def show(made: list[list[Message]]) -> Updates:
            if not (drawn := _pictures(made)):
                return {self.used: str(wish.seed)}
            gone = {} if drawn[-1].is_draft else {self.views: [*heard, drawn[-1].content]}
            return {self.place: drawn[-1].path()} | gone

        return [partial(wish.bagel.chat_request, heard, **options)], show

    # the toy world ----------------------------------------------------------------------------------------

    def _world(self) -> None:
        self.kinds = [kind for kind in TASKS if self.task_of(kind, 0)]
        with gr.Row():
            with gr.Column():
                self.kind = self.put(gr.Dropdown, "kind", choices=["any", *self.kinds], value="any")
                go = self.put(gr.Button, "draw_task", variant="primary")
                stop = self.put(gr.Button, "stop", size="sm")
                self.task = self.put(gr.Textbox, "task", interactive=False, lines=3)
            with gr.Column():
                self.verdicts = self.put(gr.Gallery, "pictures", **GALLERY)
        run = self.on(go.click, self.exercise, {self.kind}, [self.task, self.verdicts])
        stop.click(None, None, None, cancels=[run], **HIDDEN)

    def task_of(self, kind: str, seed: int) -> tuple[list[Any], Draws] | None:
        """What is heard in an exercise, and the one picture to be drawn then; None for other kinds."""
        with suppress(ValueError):  # a world need not have every kind
            assert self.world
            *given, last = example(self.world, seed, 0, kind).without_thought().steps
            if isinstance(last, Draws) and given:
                heard = [as_heard(one, self.world.side) for one in given if isinstance(one, Said | Shown)]
                return (heard, last) if len(heard) == len(given) else None
        return None

    async def exercise(self, wish: Wish) -> tuple[list[Begin], Show]:
        """Several drawings for one task, the judge's verdict under each."""
        kind = wish.given[self.kind]
        kind = random.Random(wish.seed).choice(self.kinds) if kind == "any" else kind
        heard, wanted = self.task_of(kind, wish.seed) or ([], None)
        options = {"reply": "image", "size": None, "think": wish.think}
        seeds = range(wish.seed, wish.seed + self.limits.n)
        given, right = (say(key, wish.given[self.language]) for key in ("given", "right"))

        def verdict(picture: Image.Image) -> str:
            assert wanted and self.world
            reason = judge(wanted.spec, picture, self.world).reason
            return f"✗ {reason}" if reason else right

        show = _shown_in(self.verdicts, verdict, [(one, given) for one in heard if not isinstance(one, str)])
        task = {self.task: f"{kind}: " + " · ".join(one for one in heard if isinstance(one, str))}
        begins = [partial(wish.bagel.chat_request, heard, seed=seed, **options) for seed in seeds]
        return begins, lambda made: task | show(made)


def _as_sent(blobs: dict[str, Any], payload: Any) -> Any:
    """What was painted as it came, (background, layers) as bytes or files: decoding is the gate's work."""
    while len(blobs) > VERSIONS:
        blobs.pop(next(iter(blobs)))
    sent = blobs.get(payload.id) if payload and payload.id else payload
    return sent and (sent.background, sent.layers)


def _pictures(made: list[list[Message]]) -> list[Any]:
    return [one for some in made for one in some if isinstance(one.content, Image.Image)]


def _shown_in(gallery: Any, caption: Callable[[Image.Image], str], first: Sequence[Any] = ()) -> Show:
    """Shows pictures with captions, drafts with their steps."""

    def show(made: list[list[Message]]) -> Updates:
        drawn = _pictures(made)
        for one in drawn:
            one.note = one.note or caption(one.content)
        return {gallery: [*first, *((one.path(), one.note) for one in drawn)]}

    return show


def _turn(talk: Sequence[Message], index: Any) -> tuple[int, int]:
    """Where the user's turn at or before a place begins and ends."""
    users = [False, *(one.role == "user" for one in talk), False]
    start = max(n for n in range(int(index) + 1) if not n or users[n : n + 2] == [False, True])
    return start, users.index(False, start + 1) - 1


def _last_words(talk: Sequence[Message]) -> str:
    return ([one.content for one in talk if isinstance(one.content, str)] or ["…"])[-1][:40]


# serving ----------------------------------------------------------------------------------------------------


def mount(app: FastAPI, service: Service, keys: Sequence[str] = (), *, path: str = "/ui") -> FastAPI:
    """Puts the page on an application. With keys it asks for a name, any, and for one of them as password."""
    page = Page(service)
    return gr.mount_gradio_app(app, page.blocks, path=path, auth=_door(keys), **page.appearance())


def launch(
    service: Service,
    *,
    server_name: str = "127.0.0.1",
    server_port: int | None = None,
    share: bool = False,
    password: str | None = None,
) -> tuple[gr.Blocks, str | None]:
    """Serves the page in the background, `.block_thread()` waits until it is interrupted; and its password,
    which is made where others than this machine can reach it.
    """
    if share or server_name not in ("127.0.0.1", "localhost", "::1"):
        password = password or secrets.token_urlsafe(9)
    page, capped = Page(service), {"max_body_size": service.limits.body_bytes}
    where = {"server_name": server_name, "server_port": server_port, "share": share, "strict_cors": True}
    options = {"auth": _door([password] if password else ()), "app_kwargs": capped, **page.appearance()}
    page.blocks.launch(quiet=True, prevent_thread_lock=True, **where, **options)
    return page.blocks, password


def _door(keys: Sequence[str]) -> Callable[[str, str], bool] | None:
    """Whether someone may enter, whatever the name; None where all may."""

    def opens(name: str, password: str) -> bool:
        return any([secrets.compare_digest(password.encode(), key.encode()) for key in keys])

    return opens if keys else None
