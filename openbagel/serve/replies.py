"""From the body of a request to requests of the model, and from their events to what is sent back."""

import asyncio
import base64
import io
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

from PIL import Image, UnidentifiedImageError

from openbagel.checks import retold
from openbagel.config import adjusted
from openbagel.inference.events import Picture, Text, Thought
from openbagel.inference.text import Answer
from openbagel.serve.schemas import Chat, Draw, Edit, Options, Part
from openbagel.serve.service import Draft, Ended, Service

Parts = Sequence[str | Image.Image]
Reply = Literal["auto", "text", "image"]
Tree = dict[str, Any]
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
"""What clients written for vLLM-Omni put around a text by themselves."""


@dataclass(frozen=True, slots=True)
class Finish:
    """How a reply ended, "stop" or "length", and how many tokens of texts and pictures it has."""

    reason: str
    texts: int
    images: int


class Replies:
    """What a body asks for; ValueError for what is beyond the server's limits."""

    def __init__(self, service: Service, key: str, body: Options, parts: Parts, reply: Reply) -> None:
        self.service, self.key, self.parts, self.reply = service, key, parts, reply
        self.number, self.size, self.think, self.drafts = body.n or 1, body.shape, body.think, 0
        self.seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        self.stops: list[str] = []
        self.now, self.finishes = int(time.time()), list[Finish]()
        pixels = self.size and self.size[0] * self.size[1]
        service.limits.check(n=body.n, steps=body.num_inference_steps, output_pixels=pixels)
        service.limits.check(tokens=body.budget)
        service.check_heard([*parts, body.negative_prompt or ""])
        settings, changed = service.bagel.config.settings, {}
        for task in ("draw", "edit", "ask"):  # an answer's budget holds its thought too
            options = body.sampling | {"max_tokens": body.budget}
            options["max_think_tokens"] = body.budget and body.budget * (task != "ask")
            changed[task] = adjusted(getattr(settings, task), options)
        self.bagel = service.bagel.with_settings(replace(settings, **changed))
        self.config = self.bagel.config

    async def pieces(self, index: int) -> AsyncGenerator[Text | Thought | Draft | Picture | Finish]:
        """Reply `index` as it is made, `Finish` last; a text ends before the first stop word."""
        options = {"size": self.size, "seed": self.seed + index, "think": self.think}
        options["max_parts"] = 2 * self.service.limits.n
        begin = partial(self.bagel.chat_request, self.parts, reply=self.reply, **options)
        said = held = ""
        async with aclosing(self.service.events(begin, key=self.key, drafts=self.drafts)) as events:
            async for event in events:
                ready, stopped = len(held), False
                if isinstance(event, Text):
                    held += event.text if said or held or not self.think else event.text.lstrip()
                    ready, stopped = self._ready(held)
                if ready:
                    yield Text(held[:ready])
                    said, held = said + held[:ready], held[ready:]
                if stopped:
                    self.finishes.append(Finish("stop", self._length(said), 0))
                    yield self.finishes[-1]
                    return
                if isinstance(event, Ended):
                    self.finishes.append(self._finish(event.value))
                    yield self.finishes[-1]
                elif isinstance(event, Thought | Draft | Picture):
                    yield event

    def _ready(self, text: str) -> tuple[int, bool]:
        """How much of a text may be passed on, and whether a stop word comes then; what may be one waits."""
        if found := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            return min(found), True
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return len(text) - max(begun, default=0), False

    def _finish(self, parts: Sequence[Any]) -> Finish:
        texts = images = 0
        for part in parts:
            if isinstance(part, Answer):
                texts += len(part.ids) or self._length((part.thought or "") + part)
            else:
                texts += self._length(part.info["thought"] or "")
                images += _area(part.size, self.config.latent_stride)
        ids = getattr(parts[-1], "ids", ()) if parts else ()
        return Finish("length" if ids and ids[-1] != self.bagel.codec.end else "stop", texts, images)

    def _length(self, text: str) -> int:
        return len(self.bagel.codec.encode(text))

    def heard(self) -> tuple[int, int]:
        """How many tokens the request's texts, their markers included, and its pictures have."""
        settings, patch = self.config.settings, self.config.vit.patch_size if self.config.vit else 2**20
        texts = sum(self._length(part) + 2 for part in self.parts if isinstance(part, str))
        sizes = [settings.vae_limits.fit(*part.size) for part in self.parts if isinstance(part, Image.Image)]
        seen = [_area(settings.vit_limits.fit(*size), patch) for size in sizes]
        drawn = [_area(size, self.config.latent_stride) for size in sizes if self.reply != "text"]
        return texts, sum(seen + drawn)


class Conversation(Replies):
    """Replies in the shape of chat completions."""

    def __init__(self, service: Service, key: str, body: Chat, parts: Parts) -> None:
        kinds, by_itself = {*(body.modalities or ("text",))}, service.bagel.config.settings.draws_by_itself
        reply = "text" if kinds == {"text"} else "auto" if len(kinds) > 1 and by_itself else "image"
        super().__init__(service, key, body, parts, reply)
        self.stops = body.stops
        self.with_usage = (body.stream_options or {}).get("include_usage")
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": self.now, "model": service.name}

    @classmethod
    async def of(cls, service: Service, key: str, body: Chat) -> Self:
        """A user's message that shows pictures after all of its texts is heard pictures first: the model does
        what the last text says.
        """
        parts: list[Part] = []
        for message in body.messages:
            told = message.content or []
            turned = message.role == "user" and told == sorted(told, key=lambda part: part.shows)
            parts += sorted(told, key=lambda part: not part.shows) if turned else told
        pictures = iter(await opened(service, [part.image_url.url for part in parts if part.shows]))
        texts = (part.text.removeprefix(OPEN).removesuffix(CLOSE) for part in parts if not part.shows)
        heard = [next(pictures if part.shows else texts) for part in parts]
        return cls(service, key, body, [part for part in heard if part])

    async def stream(self) -> AsyncGenerator[Tree]:
        head = self.head | {"object": "chat.completion.chunk"} | ({"usage": None} if self.with_usage else {})
        for index in range(self.number):
            begun: Tree = {"role": "assistant"}
            async for delta, reason in self._deltas(index):
                choice = {"index": index, "delta": begun | delta, "finish_reason": reason}
                yield head | {"choices": [choice]}
                begun = {}
        if self.with_usage:
            yield head | {"choices": [], "usage": self._usage()}

    async def whole(self) -> Tree:
        choices = await together(self._choice(index) for index in range(self.number))
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def _choice(self, index: int) -> Tree:
        thought, parts, reason = "", list[Tree](), None
        async for delta, ended in self._deltas(index):
            thought, reason = thought + delta.get("reasoning_content", ""), ended
            content = delta.get("content", [])
            if isinstance(content, list):
                parts += content
            elif parts and "text" in parts[-1]:
                parts[-1]["text"] += content
            else:
                parts.append({"type": "text", "text": content})
        is_text = all("text" in part for part in parts)
        message = {"role": "assistant", "content": "".join(p["text"] for p in parts) if is_text else parts}
        message |= {"reasoning_content": thought.strip()} if self.think else {}
        return {"index": index, "message": message, "finish_reason": reason, "seed": self.seed + index}

    async def _deltas(self, index: int) -> AsyncGenerator[tuple[Tree, str | None]]:
        async for piece in self.pieces(index):
            if isinstance(piece, Finish):
                yield {}, piece.reason
            elif isinstance(piece, Picture):
                url = "data:image/png;base64," + await asyncio.to_thread(encoded, piece.picture)
                yield {"content": [{"type": "image_url", "image_url": {"url": url}}]}, None
            elif isinstance(piece, Text | Thought):
                yield {"content" if isinstance(piece, Text) else "reasoning_content": piece.text}, None

    def _usage(self) -> Tree:
        heard, made = sum(self.heard()), sum(one.texts + one.images for one in self.finishes)
        return {"prompt_tokens": heard, "completion_tokens": made, "total_tokens": heard + made}


class Drawings(Replies):
    """Replies in the shape of generated and edited pictures; outside a mask the last one shown stays."""

    def __init__(self, service: Service, key: str, body: Draw, shown: Sequence[Image.Image] = ()) -> None:
        super().__init__(service, key, body, [*shown, body.prompt], "image")
        self.body, self.name = body, "image_edit" if shown else "image_generation"
        self.drafts = body.partial_images or 0 if body.stream else 0
        self.before = shown[-1] if shown else None
        self.free = None
        if body.response_format == "url" or body.background == "transparent":
            raise ValueError("pictures are opaque and come as b64_json; leave out url and transparent")
        if isinstance(body, Edit) and body.mask is not None:
            self.free = changeable(body.mask, shown[-1].size)

    @classmethod
    async def of(cls, service: Service, key: str, body: Draw) -> Self:
        if isinstance(body, Edit) and body.mask is not None:
            await opened(service, [body.mask])
        return cls(service, key, body, await opened(service, body.image if isinstance(body, Edit) else ()))

    async def stream(self) -> AsyncGenerator[Tree]:
        for index in range(self.number):
            async for event in self._events(index):
                yield event

    async def whole(self) -> Tree:
        made = await together(self._last(index) for index in range(self.number))
        told = ("b64_json", "seed", "revised_prompt")
        data = [{name: one[name] for name in told} for one in made]
        head = {name: made[0][name] for name in ("background", "output_format", "size")}
        return {"created": self.now, "data": data, "usage": self._usage(self.finishes), **head}

    async def _last(self, index: int) -> Tree:
        return [event async for event in self._events(index)][-1]

    async def _events(self, index: int) -> AsyncGenerator[Tree]:
        drafts, last = 0, Tree()
        async for piece in self.pieces(index):
            if isinstance(piece, Thought):
                yield {"type": f"{self.name}.reasoning", "delta": piece.text}
            elif isinstance(piece, Draft):
                event = {"type": f"{self.name}.partial_image", "partial_image_index": drafts}
                yield event | await self._told(piece.picture)
                drafts += 1
            elif isinstance(piece, Picture):
                last = await self._told(piece.picture)
                last |= {"seed": self.seed + index, "revised_prompt": piece.picture.info["thought"]}
            elif isinstance(piece, Finish):
                yield last | {"type": f"{self.name}.completed", "usage": self._usage([piece])}

    async def _told(self, picture: Image.Image) -> Tree:
        if self.before and self.free:
            before, free = (one.resize(picture.size) for one in (self.before, self.free))
            picture = Image.composite(picture, before, free)
        size, form = f"{picture.width}x{picture.height}", self.body.output_format or "png"
        code = await asyncio.to_thread(encoded, picture, form, self.body.output_compression)
        told = {"b64_json": code, "size": size, "output_format": form, "background": "opaque"}
        return told | {"created_at": self.now, "quality": "auto"}

    def _usage(self, finishes: Sequence[Finish]) -> Tree:
        heard = self.heard()
        made = sum(one.texts for one in finishes), sum(one.images for one in finishes)
        given, drawn = ({"text_tokens": texts, "image_tokens": images} for texts, images in (heard, made))
        usage = {"input_tokens": sum(heard), "output_tokens": sum(made), "total_tokens": sum(heard + made)}
        return usage | {"input_tokens_details": given, "output_tokens_details": drawn}


def _area(size: tuple[int, int], side: int) -> int:
    return (size[0] // side) * (size[1] // side)


async def together(replies: Iterable[Coroutine[Any, Any, Tree]]) -> list[Tree]:
    """All of them; where one fails the others end, and its error is told."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(reply) for reply in replies]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def opened(service: Service, sources: Sequence[str | bytes]) -> list[Image.Image]:
    """Pictures through the gate."""
    service.limits.check(pictures=len(sources))
    gate = service.gate
    opening = [gate.open(one) if isinstance(one, bytes) else gate.open_source(one) for one in sources]
    return await asyncio.gather(*opening)


def encoded(picture: Image.Image, format: str = "png", quality: int | None = None) -> str:
    """A picture as base64, pixels only."""
    bare, file = Image.frombytes(picture.mode, picture.size, picture.tobytes()), io.BytesIO()
    bare.save(file, format, quality=95 if quality is None else quality)
    return base64.b64encode(file.getvalue()).decode("ascii")


def changeable(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Where a mask lets a picture change: 255 where it is transparent. For bytes that passed the gate, which
    keeps no transparency.
    """
    wrong = retold("the mask must be a PNG with transparency", UnidentifiedImageError)
    with wrong, Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
        if mask.size != size:
            raise ValueError(f"the mask is {mask.size}, the last picture {size}; make them equal in size")
        return mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)
