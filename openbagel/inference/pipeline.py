"""`Bagel`: one loaded model and its verbs."""

import copy
import io
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypedDict, Unpack, overload

import torch
from PIL import Image

from openbagel.checks import check_choice
from openbagel.config import ModelSettings, Sampling
from openbagel.flow import Guidance
from openbagel.hub import find_model
from openbagel.inference import events
from openbagel.inference.context import Context
from openbagel.inference.engine import PIECE, Engine, Request, in_pieces, take_in
from openbagel.inference.image import Branches
from openbagel.inference.interleave import interleave
from openbagel.inference.pictures import Brush, PictureCodec, clips
from openbagel.inference.text import Answer, answer_of, split_thought, write
from openbagel.inference.video import film
from openbagel.lora import load_adapter
from openbagel.picture_files import PictureSource, open_picture, read_frames
from openbagel.placement import Placement, place
from openbagel.quantize import check_device, precision_of, quantize
from openbagel.sequence import Packer, Segment, Text
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from openbagel.weights import Checkpoint, default_device, default_dtype, load_checkpoint

Part = PictureSource
"""Something said or shown: where texts may stand a `str` is text, all else is a picture."""
Listener = Callable[[events.Event], object]
Lora = str | Path | Sequence[str | Path] | Mapping[str, float]
"""An adapter, several, or several with their weights."""


class LoadOptions(TypedDict, total=False):
    """More keywords of `Bagel.load`."""

    understanding_only: bool
    settings: dict[str, Any] | None
    quantize: str | None
    lora: Lora | None
    offload: str | None
    max_memory: Mapping[int | str, int | str] | None


class DrawOptions(TypedDict, total=False):
    """The keywords of `Bagel.generate`."""

    size: tuple[int, int] | None
    seed: int
    think: bool
    guidance: Guidance | None


class FilmOptions(TypedDict, total=False):
    """The keywords of `Bagel.continue_video` that are no text."""

    size: tuple[int, int] | None
    seed: int
    group: int | None


class Bagel:
    """Draws, answers, edits and chats. Holds weights only: every call owns its contexts and its random
    generator.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.codec = checkpoint.config, checkpoint.codec
        self.model, self.autoencoder = checkpoint.model, checkpoint.autoencoder
        self.engine = Engine(self.model, Packer(self.config, self.codec))
        self.pictures = PictureCodec(self.config, self.autoencoder)
        self.encode, self.decode = self.pictures.encode, self.pictures.decode
        self.listen: Listener = _unheard
        self.placement: Placement | None = None

    @classmethod
    def load(
        cls,
        model: str | Path = "nano",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Unpack[LoadOptions],
    ) -> "Bagel":
        """Loads "nano" (ships with the package), a folder, or a Hugging Face model id (perhaps id@revision).

        device None: CUDA if there is one, else the CPU. dtype None: bfloat16 on CUDA cards that have it, else
        float32. understanding_only leaves the generation expert and the autoencoder on disk. settings
        override top-level entries of config.json. quantize ("int8", "fp8", "nf4", "int4") packs the linears
        of the decoder's layers on the way. lora is one adapter to bind or several, each a path or a Hugging
        Face id; a dict gives each its weight. `openbagel.lora.merge(bagel.model)` merges them.

        offload ("blocks", "sequential") leaves the weights in host memory, from where they visit the device.
        device "auto" spreads them over all devices, max_memory={0: "24GB", "cpu": "64GB"} over those named.
        """
        for name in options:
            check_choice("option", name, LoadOptions.__annotations__)
        offload, max_memory = options.get("offload"), options.get("max_memory")
        spread = str(device) == "auto" or (max_memory is not None and device is None)
        placed = spread or offload is not None or max_memory is not None
        chosen = default_device(None if spread else device)
        dtype = default_dtype(chosen, dtype)
        precision = options.get("quantize")
        waits = precision is not None or placed
        checkpoint = load_checkpoint(
            find_model(model),
            dtype=None if waits else dtype,  # None: in the file's pages, packed or streamed from there
            device="cpu" if waits else chosen,
            understanding_only=options.get("understanding_only", False),
            settings=options.get("settings"),
        )
        if precision:
            home = torch.device("cpu") if placed else chosen
            quantize(checkpoint.model, precision, device=home, dtype=dtype)
            if checkpoint.autoencoder is not None:
                checkpoint.autoencoder.to(home, dtype)
        check_device(precision_of(checkpoint.model), chosen)
        for name, weight in _adapters(options.get("lora")):
            load_adapter(checkpoint.model, find_model(name), weight=weight)
        bagel = cls(checkpoint)
        if placed:
            where = "auto" if spread else chosen
            bagel.placement = place(checkpoint, where, dtype, offload=offload, max_memory=max_memory)
        return bagel

    def using(self, sampling: Sampling | None = None, *, listen: Listener | None = None) -> "Bagel":
        """The same model with other options for every verb, or with a listener that receives every event.

        An exception that the listener raises ends the request: that is how a caller cancels between steps or
        tokens.
        """
        other = self
        if sampling is not None:
            tasks = replace(self.config.settings, draw=sampling, edit=sampling, ask=sampling, film=sampling)
            other = self.with_settings(tasks)
        other = copy.copy(other)
        other.listen = listen or self.listen
        return other

    def with_settings(self, settings: ModelSettings) -> "Bagel":
        """The same model with other facts than its config.json has, such as how pictures are resized."""
        other = copy.copy(self)
        other.config = replace(self.config, settings=settings)
        other.pictures = PictureCodec(other.config, self.autoencoder)
        other.encode, other.decode = other.pictures.encode, other.pictures.decode
        return other

    @overload
    def generate(self, prompt: str, **options: Unpack[DrawOptions]) -> Image.Image: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[DrawOptions]) -> list[Image.Image]: ...
    def generate(
        self,
        prompt: str | list[str],
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        think: bool = False,
        guidance: Guidance | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Draws a picture for a prompt, or one for each of several.

        size: (height, width) in pixels, multiples of the latent stride. Prompt number i is drawn with seed +
        i. think lets the model plan in words first (the plan is in `picture.info["thought"]`). guidance
        replaces the model's own.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        seed = seeded(seed).initial_seed()
        sampling = _guided(self.config.settings.draw, guidance)
        requests = [
            self.draw_request([text], size=size, seed=seed + i, think=think, sampling=sampling)
            for i, text in enumerate(prompts)
        ]
        pictures = self.engine.drive_all(requests, lambda _, event: self.listen(event))
        return pictures[0] if isinstance(prompt, str) else pictures

    def edit(
        self,
        images: Part | Sequence[Part],
        instruction: str,
        *,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        think: bool = False,
        guidance: Guidance | None = None,
    ) -> Image.Image:
        """Draws what the instruction makes of one or several pictures; as large as the last of them unless
        size says.
        """
        parts = [*_pictures(images), instruction]
        if len(parts) == 1:
            raise ValueError("nothing to edit: give at least one picture")
        sampling = _guided(self.config.settings.edit, guidance)
        request = self.draw_request(parts, size=size, seed=seed, think=think, sampling=sampling)
        return self.engine.drive(request, self.listen)

    def ask(
        self, images: Part | Sequence[Part], question: str, *, seed: int = 0, think: bool = False
    ) -> Answer:
        """Answers a question about one or several pictures (none: a plain text question)."""
        parts = [*_pictures(images), question]
        return self.engine.drive(self.write_request(parts, seed=seed, think=think), self.listen)

    def continue_video(
        self,
        frames: Part | Sequence[Part] = (),
        num_frames: int = 10,
        *,
        prompt: str | None = None,
        guidance: Guidance | None = None,
        **options: Unpack[FilmOptions],
    ) -> list[Image.Image]:
        """Goes on with a clip for num_frames frames, as the prompt says; without frames it films the prompt.

        frames: pictures of one size, paths of pictures, or of GIF and video files (then all their frames).
        size: (height, width) in pixels; the given frames are brought to it. seed of the noise. group: frames
        drawn together, by default as the model was trained. Without a prompt there is no text guidance. Every
        frame's `.info` holds seed and settings.
        """
        parts: list[Part] = []
        for given in _pictures(frames):
            parts += read_frames(given) if isinstance(given, Path) else [given]
        own = self.config.settings.filming(shown=bool(parts), told=bool(prompt))
        sampling = _guided(own, guidance)
        parts += [prompt] if prompt else []
        request = self.film_request(parts, num_frames=num_frames, sampling=sampling, **options)
        return self.engine.drive(request, self.listen)

    def chat(
        self,
        parts: Part | Sequence[Part],
        *,
        reply: Literal["auto", "text", "image"] = "auto",
        size: tuple[int, int] | None = None,
        seed: int = 0,
        think: bool = False,
        max_parts: int = 16,
    ) -> list[Answer | Image.Image]:
        """Continues a conversation of texts and pictures and returns what the model adds, in order.

        reply: "text" or "image" asks for one of them; "auto" lets the model decide what to write and draw
        until it ends its turn or has added max_parts, which only models trained to decide can (ValueError
        otherwise).
        """
        request = self.chat_request(
            parts, reply=reply, size=size, seed=seed, think=think, max_parts=max_parts
        )
        return self.engine.drive(request, self.listen)

    def chat_request(
        self,
        parts: Part | Sequence[Part],
        *,
        reply: Literal["auto", "text", "image"],
        size: tuple[int, int] | None,
        seed: int,
        think: bool,
        max_parts: int = 16,
    ) -> Request[list[Answer | Image.Image]]:
        """A request that does what `chat` does."""
        parts = _several(parts)
        if reply not in ("auto", "text", "image") or not parts:
            raise ValueError(
                f'"{reply}" is none of auto, text and image' if parts else "nothing was said or shown"
            )
        if reply == "auto":
            return self.interleave_request(parts, size=size, seed=seed, think=think, max_parts=max_parts)
        if reply == "text":
            return _alone(self.write_request(parts, seed=seed, think=think))
        sampling = self._sampling(parts)
        return _alone(self.draw_request(parts, size=size, seed=seed, think=think, sampling=sampling))

    def write_request(self, parts: Sequence[Part], *, seed: int, think: bool) -> Request[Answer]:
        """A request that takes in parts and writes an answer."""
        sampling = self.config.settings.ask
        heard: list[Segment] = [*self._said(THINK_BEFORE_ANSWERING)] if think else []
        for part in self._opened(parts):
            heard += self._said(part) if isinstance(part, str) else [self.pictures.look(part)]
        generator = seeded(seed)

        def request() -> Request[Answer]:
            context = Context(self.config.llm)
            yield from take_in([context], heard)
            budget = sampling.max_tokens + (sampling.max_think_tokens if think else 0)
            ids = yield from write(
                context, self.codec, sampling=sampling, max_tokens=budget, generator=generator, thinking=think
            )
            yield events.Done()
            return answer_of(ids, self.codec, budget=budget, thinking=think)

        return request()

    def draw_request(
        self,
        parts: Sequence[Part],
        *,
        size: tuple[int, int] | None,
        seed: int,
        think: bool,
        sampling: Sampling,
    ) -> Request[Image.Image]:
        """A request that takes in parts and draws a picture."""
        opened = self._opened(parts)
        brush = self._brush(opened, size, seed, sampling)
        heard = self._heard(opened, brush, think)

        def request() -> Request[Image.Image]:
            thought = None
            branches = Branches.of(Context(self.config.llm))
            yield from branches.hear(heard)
            if think:
                ids = yield from write(
                    branches.cond,
                    self.codec,
                    sampling=sampling,
                    max_tokens=sampling.max_think_tokens,
                    generator=brush.generator,
                    thinking=True,
                )
                text = self.codec.decode(ids)
                thought = split_thought(text)[0] or text.strip()
            (picture,), _ = yield from brush.draw(branches, thought=thought)
            yield events.Done()
            return picture

        return request()

    def film_request(
        self,
        parts: Sequence[Part],
        *,
        num_frames: int,
        sampling: Sampling | None = None,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        group: int | None = None,
    ) -> Request[list[Image.Image]]:
        """A request that takes in parts, neighbouring pictures as one clip, and draws the frames after them.

        Without a text there is no text guidance; image guidance leads away from clips of anything else.
        """
        if not parts:
            raise ValueError("nothing to film: give frames, a prompt, or both")
        settings = self.config.settings
        together = settings.video_group if group is None else group
        if num_frames < 1 or together < 1:
            raise ValueError(f"num_frames {num_frames} and group {together} must be at least 1")
        opened = self._opened(parts)
        told, shown = (any(isinstance(part, kind) for part in opened) for kind in (str, Image.Image))
        sampling = sampling or settings.filming(shown=shown, told=told)
        if not (told or sampling.guidance.uses_image):
            sampling = replace(sampling, guidance=replace(sampling.guidance, text=1.0))
        brush = self._brush(opened, size, seed, sampling)
        heard = self._heard(clips(opened, size), brush)
        return film(heard, brush, num_frames=num_frames, group=together, window=settings.video_window)

    def interleave_request(
        self,
        parts: Sequence[Part],
        *,
        size: tuple[int, int] | None,
        seed: int,
        think: bool,
        max_parts: int = 16,
    ) -> Request[list[Answer | Image.Image]]:
        """A request that takes in parts, then writes and draws as the model decides; see `chat`.

        ValueError for models that were not trained to decide.
        """
        settings = self.config.settings
        if not settings.draws_by_itself or self.codec.end_of_text is None:
            raise ValueError(
                "this model was not trained to decide between writing and drawing; "
                'pass reply="text" or reply="image"'
            )
        if max_parts < 1:
            raise ValueError(f"max_parts {max_parts} must be at least 1")
        opened = self._opened(parts)
        brush = self._brush(opened, size, seed, self._sampling(parts))
        return interleave(
            self._heard(opened, brush, think),
            brush,
            codec=self.codec,
            writing=settings.ask,
            think=think,
            max_parts=max_parts,
        )

    def _opened(self, parts: Sequence[Part]) -> list[str | Image.Image]:
        """Texts as they are, pictures within the limits: looking resizes twice, as the official one does."""
        limits = self.config.settings.vae_limits
        return [part if isinstance(part, str) else limits.resize(open_picture(part)) for part in parts]

    def _brush(
        self, parts: Sequence[str | Image.Image], size: tuple[int, int] | None, seed: int, sampling: Sampling
    ) -> Brush:
        """A brush for pictures of a size, else of the last picture's, else of the model's own."""
        sizes = [self.config.settings.size, *((p.height, p.width) for p in parts if not isinstance(p, str))]
        grid = self.pictures.grid_of(sizes[-1] if size is None else size)
        negative = self._said(sampling.negative_prompt) if sampling.negative_prompt else ()
        return Brush(self.pictures, grid, sampling, seeded(seed), self.engine.device, negative)

    def _heard(
        self, parts: Sequence[str | Image.Image | list[Image.Image]], brush: Brush, think: bool = False
    ) -> list[list[Segment]]:
        """What drawing takes in: texts, and the segments of each picture or clip."""
        heard: list[list[Segment]] = [[*self._said(THINK_BEFORE_DRAWING)]] if think else []
        for part in parts:
            if isinstance(part, str):
                heard.append([*self._said(part)])
            else:
                heard.append(brush.shown(part if isinstance(part, list) else [part]))
        return heard

    def _said(self, text: str) -> list[Text]:
        ids = tuple(self.codec.encode(text))
        marked = self.codec.start, *ids, self.codec.end
        return [Text(ids)] if len(marked) <= PIECE else in_pieces(marked)

    def _sampling(self, parts: Sequence[Part]) -> Sampling:
        """Of a drawing where only texts are heard, else of an edit."""
        settings = self.config.settings
        return settings.draw if all(isinstance(part, str) for part in parts) else settings.edit


def _alone(request: Request[Any]) -> Request[list[Any]]:
    return [(yield from request)]


def _unheard(event: events.Event) -> None:
    """Listens to nothing; no lambda, so that a model can be pickled."""


def seeded(seed: SupportsIndex) -> torch.Generator:
    if not (isinstance(seed, SupportsIndex) and 0 <= operator.index(seed) < 2**63):
        raise ValueError(f"seed {seed!r} must be a whole number and lie in [0, 2^63)")
    return torch.Generator().manual_seed(operator.index(seed))


def _adapters(lora: Lora | None) -> Iterable[tuple[str | Path, float]]:
    if isinstance(lora, Mapping):
        return lora.items()
    names = [lora] if isinstance(lora, (str, Path)) else lora or ()
    return [(name, 1.0) for name in names]


def _several(given: Any) -> list[Any]:
    """One part for itself counts as a list of it."""
    alone = isinstance(given, str | bytes | io.IOBase) or not isinstance(given, Sequence | Iterator)
    return [given] if alone else list(given)


def _pictures(images: Part | Sequence[Part]) -> list[Part]:
    return [Path(image) if isinstance(image, str) else image for image in _several(images)]


def _guided(sampling: Sampling, guidance: Guidance | None) -> Sampling:
    if not isinstance(guidance, Guidance | None):
        raise ValueError(f"guidance {guidance!r} is no Guidance; write Guidance(text=3.0)")
    return replace(sampling, guidance=guidance) if guidance else sampling
