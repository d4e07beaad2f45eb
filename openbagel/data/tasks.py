"""What a row of data means: a task turns its fields into parts, nothing decoded.

A picture field holds encoded bytes, a path relative to the data set's folder, a Hugging Face struct {bytes,
path}, or a `Picture` in memory. Order and dropouts follow the reference; what it never released follows
the paper (§2.3, §3.3).
"""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from openbagel.checks import nearest, retold
from openbagel.data.samples import BadRow, Draw, FrameSampler, Look, Part, Picture, Role, evenly, video_frames
from openbagel.images import ImageLimits
from openbagel.sequence import Text
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, TextCodec

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dropout:
    """How often each kind of condition is left out, in the paper's order; guidance needs that."""

    text: float
    vit: float
    vae: float

    def __post_init__(self) -> None:
        if not all(0 <= p <= 1 for p in (self.text, self.vit, self.vae)):
            raise ValueError(f"{self}: probabilities lie in 0 … 1")


PAPER = Dropout(0.1, 0.5, 0.1)
SCRIPT = Dropout(text=0.1, vit=0.3, vae=0.3)
NEVER = Dropout(0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSetting:
    """What a task needs beside the row; rng decides everything that is random."""

    codec: TextCodec
    vae: ImageLimits
    vit: ImageLimits | None
    """None: the model has no ViT, every look counts as dropped."""
    dropout: Dropout
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    folder: Path = Path()
    """Where relative paths of pictures and videos start."""
    frames: FrameSampler = FrameSampler()
    text_loss: bool = False
    """web_interleaved: learn the texts and captions too."""
    group_decay: float = 1.0
    """video_interleaved: n groups are drawn with a weight of group_decay^(n - 1)."""
    window: int | None = None
    """video_interleaved: one group is learned after so many clean frames; None: after all before it."""
    noisy_history: float = 0.5
    """video_interleaved: how often the frames before the last group are noised (diffusion forcing)."""
    copies: int = 1
    """Noised copies of a lone picture that is learned, each at its own time."""

    def drops(self, probability: float) -> bool:
        return self.rng.random() < probability

    def text(self, words: str, *, loss: bool = False) -> Text:
        return Text(self.codec.encode(words), loss)

    def prompt(self, words: str) -> list[Part]:
        """A text that may be dropped; then nothing takes its place."""
        return [] if self.drops(self.dropout.text) else [self.text(words)]

    def seen(self, picture: Picture | None, num_images: int = 1) -> Look:
        return Look(picture if self.vit else None, self.vit or self.vae, num_images)

    def condition(self, pictures: Sequence[Picture], step: int = 1) -> list[Part]:
        """Clean pictures of one split, then looks at each; what is dropped keeps its positions."""
        clean = [Draw(tuple(pictures), self.vae, Role.CONDITION, step)]
        if self.drops(self.dropout.vae):
            clean = [Draw((), self.vae, Role.CONDITION)] * ((len(pictures) - 1) * step + 1)
        return [*clean, *(self.seen(None if self.drops(self.dropout.vit) else p) for p in pictures)]

    def target(self, picture: Picture) -> Draw:
        return Draw((picture,), self.vae, Role.TARGET, copies=self.copies)

    def picture(self, value: Any, name: str) -> Picture:
        return picture_in(self.folder, value, name)

    def pictures(self, row: Row, name: str) -> list[Picture]:
        """Of a field that holds a list, or one."""
        if not isinstance(value := _field(row, name), list | tuple):
            return [self.picture(value, name)]
        return [self.picture(item, f"{name}[{place}]") for place, item in enumerate(value)]

    def video(self, row: Row, count: int | None = None) -> list[Picture]:
        """`count` frames of the row's video from first to last, else as many as the sampler says."""
        path = self.folder / _words(_field(row, "video"), "video")
        choose = partial(evenly, count) if count else partial(self.frames.indices, rng=self.rng)
        with retold("field 'video': {error}", ValueError, kind=BadRow):
            return video_frames(path, choose)


# fields ----------------------------------------------------------------------------------------------------


def picture_in(folder: Path, value: Any, name: str, *, whole: bool = False) -> Picture:
    """Of a field's bytes, path in `folder`, or struct; whole: it is decoded once to see that it can be.

    BadRow naming the field and the remedy when it is missing, no picture or damaged.
    """
    if isinstance(value, Picture):
        return value
    content = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    content = folder / content if isinstance(content, str | Path) else content
    if not isinstance(content, bytes | Path):
        raise BadRow(f"field {name!r} holds no picture but {_short(value)}; give its bytes or path")
    with retold(f"field {name!r}: {{error}}", ValueError, kind=BadRow):
        picture = Picture.of(content)
        if whole:
            picture.open()
        return picture


def _field(row: Row, *names: str) -> Any:
    """The first of the fields that has a value."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    given, wanted = [name for name in row if row[name] is not None], " or ".join(map(repr, names))
    hint, has = nearest(names[0], given), ", ".join(given) or "none"
    raise BadRow(f"field {wanted} is missing{hint}; the row has {has}")


def _words(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is no text but {_short(value)}; write a string")
    return value


def _list(row: Row, name: str, length: int | None = None) -> list[Any]:
    value = _field(row, name)
    if not isinstance(value, list | tuple):
        raise BadRow(f"field {name!r} is no list but {_short(value)}; write [{_short(value)}]")
    if length not in (None, len(value)):
        raise BadRow(f"field {name!r} has {len(value)} entries; write {length}")
    return list(value)


def _short(value: Any) -> str:
    return repr(value[:40] if isinstance(value, str | bytes) else value)[:60]


def _one_of(value: Any, name: str, rng: random.Random) -> str:
    """A text, or one of a list of texts."""
    return _words(rng.choice(value) if isinstance(value, list | tuple) and value else value, name)


def _caption(row: Row, rng: random.Random) -> str:
    """One of `captions` ({name: text}, or its JSON, or a list), or `caption` or `text`; none is one space."""
    captions = _field(row, "captions", "caption", "text")
    if row.get("captions") is None:
        return _one_of(captions, "caption", rng)
    with suppress(ValueError, RecursionError):
        captions = json.loads(captions) if isinstance(captions, str) else captions
    if not isinstance(captions, dict | list):
        raise BadRow(f'field \'captions\' is no JSON object: {_short(captions)}; write {{"caption": "…"}}')
    texts = captions.values() if isinstance(captions, dict) else captions
    choices = [text for text in texts if text is not None]
    return _one_of(choices, "captions", rng) if choices else " "


# the tasks of the reference --------------------------------------------------------------------------------


def t2i_pretrain(row: Row, setting: TaskSetting) -> list[Part]:
    """`image`, and `captions`, `caption` or `text`: [caption] target."""
    caption = setting.prompt(_caption(row, setting.rng))
    return [*caption, setting.target(setting.picture(_field(row, "image"), "image"))]


def unified_edit(row: Row, setting: TaskSetting) -> list[Part]:
    """`image_list` of n pictures, `instruction_list` of n - 1 lists of alternatives: one or two steps.

    source [instruction] target, and with two steps: source [instruction] target source [instruction] target,
    or, every second time, source [both instructions] last target. That jump ends one picture earlier when it
    would reach the row's last, as in the reference, and so is one step then.
    """
    rng, pictures = setting.rng, setting.pictures(row, "image_list")
    if len(pictures) < 2:
        raise BadRow(f"field 'image_list' has {len(pictures)} pictures; write two or more")
    steps = _list(row, "instruction_list", len(pictures) - 1)
    start = rng.randrange(len(pictures) - 1)
    end = rng.randint(start + 1, min(start + 2, len(pictures) - 1))
    jump = end - start > 1 and rng.random() < 0.5
    if jump and end == len(pictures) - 1:
        end -= 1
    prompts = [_one_of(alternatives, "instruction_list", rng) for alternatives in steps[start:end]]
    drawn = pictures[start + 1 : end + 1]
    if jump:
        prompts, drawn = ["".join(f"{prompt}. " for prompt in prompts).rstrip()], drawn[-1:]
    parts: list[Part] = []
    for source, prompt, target in zip([pictures[start], *drawn], prompts, drawn, strict=False):
        parts += [*setting.condition([source]), *setting.prompt(prompt), setting.target(target)]
    return parts


def vlm_sft(row: Row, setting: TaskSetting) -> list[Part]:
    """`conversations` [{from: human | gpt | system, value}], and `image` (one or a list) or `video`.

    `<image>` marks, as many as pictures, stand in what the human says; `<video>` stands for all frames. Only
    what gpt says is learned. A gpt turn with a `thought` is written as <think>thought</think>value, after the
    system prompt that asks for thinking. Nothing is dropped.
    """
    is_video = bool(row.get("video")) and not row.get("image")
    pictures = setting.video(row) if is_video else setting.pictures(row, "image") if row.get("image") else []
    looks = [setting.seen(picture, len(pictures)) for picture in pictures]
    parts: list[Part] = []
    marks, thinks = 0, False
    for turn in _list(row, "conversations"):
        who, said = _turn(turn)
        if who == "gpt":
            thinks = thinks or bool(turn.get("thought"))
            parts.append(setting.text(said, loss=True))
            continue
        pieces = (said.replace("<video>", "<image>" * len(looks)) if is_video else said).split("<image>")
        for number, piece in enumerate(pieces):
            parts += looks[marks + number - 1 : marks + number] if number else []
            words = piece.strip() if len(pieces) > 1 else piece
            parts += [setting.text(words)] if words else []
        marks += len(pieces) - 1
    if marks != len(looks):
        remedy = "write one <image> for each, or <video>"
        raise BadRow(f"field 'conversations' has {marks} marks for {len(looks)} pictures; {remedy}")
    system = [setting.text(THINK_BEFORE_ANSWERING)] if thinks else []
    return _learnable([*system, *parts], "conversations")


def _turn(turn: Any) -> tuple[str, str]:
    """Who says what, a thought before it."""
    if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt", "system"):
        raise BadRow(f"field 'conversations': {_short(turn)} comes from none of human, gpt, system")
    thought = _thinking(turn["thought"]) if turn.get("thought") else ""
    return turn["from"], thought + _words(turn.get("value"), "conversations")


def _thinking(thought: Any) -> str:
    return f"<think>{_words(thought, 'thought')}</think>"


def _learnable(parts: list[Part], name: str) -> list[Part]:
    drawn = any(isinstance(part, Draw) and part.role is not Role.CONDITION for part in parts)
    if drawn or any(isinstance(part, Text) and part.loss and part.ids for part in parts):
        return parts
    raise BadRow(f"field {name!r} holds nothing to learn; write a text or answer, or a text before a picture")


# the tasks of the paper that nobody released ---------------------------------------------------------------


def text(row: Row, setting: TaskSetting) -> list[Part]:
    """`text`: a plain document, learned."""
    return _learnable([setting.text(_words(_field(row, "text"), "text"), loss=True)], "text")


def interleaved_und(row: Row, setting: TaskSetting) -> list[Part]:
    """`texts` and `images`, lists of one length with a null in one of them at each place.

    Texts are learned, pictures are looked at.
    """
    items = [item for item, _ in _document({**row, "captions": None}, setting)]
    count = sum(isinstance(item, Picture) for item in items)
    parts = [setting.text(i, loss=True) if isinstance(i, str) else setting.seen(i, count) for i in items]
    return _learnable([*parts], "texts")


def web_interleaved(row: Row, setting: TaskSetting) -> list[Part]:
    """`texts` and `images` as in `interleaved_und`, optional `captions` beside the images.

    text [caption] picture text …: a picture is learned, then seen clean by what follows; one that begins the
    row is only given. Texts may be dropped, or with `text_loss` are learned and stay; without it what follows
    the last picture is left out.

    Optional: `learned`, a list that says of each place whether the model makes it. A picture that it makes
    last is seen clean too, and the end after it is learned.
    """
    items = _document(row, setting)
    writes = any(learned and isinstance(item, str) for item, learned in items)
    while items and not writes and isinstance(items[-1][0], str):
        items.pop()
    ends = bool(row.get("learned") and items and items[-1][1] and isinstance(items[-1][0], Picture))
    parts: list[Part] = []
    for index, (item, learned) in enumerate(items, 1):
        if isinstance(item, str):
            parts += [setting.text(item, loss=True)] if learned else setting.prompt(item)
            continue
        parts += [setting.target(item)] if learned else []
        parts += setting.condition([item]) if ends or index < len(items) else []
    if ends and setting.codec.end_of_text is not None:
        parts.append(Text((setting.codec.end_of_text,), loss=True, bare=True))
    return _learnable(parts, "images")


def _document(row: Row, setting: TaskSetting) -> list[tuple[str | Picture, bool]]:
    """Texts, captions and pictures in order, a caption before its picture, each with whether it is learned;
    empty texts are left out.
    """
    texts = _list(row, "texts")
    images = _list(row, "images", len(texts))
    captions = _list(row, "captions", len(texts)) if row.get("captions") else [None] * len(texts)
    flags = _list(row, "learned", len(texts)) if row.get("learned") else [None] * len(texts)
    items: list[tuple[str | Picture, bool]] = []
    for place, (words, image, caption) in enumerate(zip(texts, images, captions, strict=True)):
        if (words is None) == (image is None):
            raise BadRow(f"fields 'texts' and 'images' at {place}: write null in one of the two")
        said, flag = caption if words is None else words, flags[place]
        if said is not None and _words(said, f"texts[{place}]").strip():
            items.append((said, setting.text_loss if flag is None else flag and words is not None))
        if image is not None:
            picture = setting.picture(image, f"images[{place}]")
            items.append((picture, bool(items) if flag is None else bool(flag)))
    return items


def video_interleaved(row: Row, setting: TaskSetting) -> list[Part]:
    """`frames` (a list) or `video` (a path), and `captions` of the change from each frame to the next.

    Optional: `caption` of the first frame; `frame_step`, the rotary positions from a frame to the next of its
    group (1); `given`, so many first frames that are one clean group and never learned.

    The other frames are grouped at random; captions of changes into and inside a group stand before it. The
    last group is always learned. Those before it are given clean (a lone frame that something precedes is
    learned first, as in an edit), or all are noised and learned. With `given` a clean history ends after any
    group, so that each is learned after it. Without captions the sampler chooses the frames of a video. A
    `window` cuts a clip so that any one group comes after the last frames before it, as one clean group.
    """
    changes = _list(row, "captions") if row.get("captions") else []
    count = len(changes) + 1 if changes else None
    frames = setting.pictures(row, "frames") if row.get("frames") else setting.video(row, count)
    leads = [row.get("caption"), *(changes and _list(row, "captions", len(frames) - 1))]
    step, given = row.get("frame_step") or 1, row.get("given") or 0
    if not (isinstance(step, int) and step > 0):
        raise BadRow(f"field 'frame_step' is {_short(step)}; write a whole number above 0")
    if not (isinstance(given, int) and 0 <= given < len(frames)):
        raise BadRow(f"field 'given' is {_short(given)}; write a number below that of frames, {len(frames)}")
    noisy = setting.drops(setting.noisy_history)
    sizes = random_groups(len(frames) - given, setting.rng, setting.group_decay)
    if setting.window is not None or (row.get("given") is not None and not noisy):
        sizes = sizes[: setting.rng.randint(1, len(sizes))]
    if setting.window is not None:
        *before, size = sizes
        end = given + sum(before)
        start, end = max(0, end - setting.window), end + size
        frames, leads = frames[start:end], [leads[0], *leads[start + 1 : end]]
        given, sizes = end - start - size, [size]
    parts: list[Part] = []
    first, stop = 0, given + sum(sizes)
    for size in [given, *sizes] if given else sizes:
        end = first + size
        before = [words for words in leads[first:end] if words is not None]
        for words in before:
            parts += setting.prompt(_words(words, "captions"))
        kept, alone = end <= given or (end < stop and not noisy), size == 1
        if alone and end > given and (end == stop or (kept and (first or before))):
            parts.append(setting.target(frames[first]))
        elif not kept:
            parts.append(Draw(tuple(frames[first:end]), setting.vae, Role.GROUP, step))
        parts += setting.condition(frames[first:end], step) if kept else []
        first = end
    return parts


def random_groups(length: int, rng: random.Random, decay: float) -> list[int]:
    """Splits `length` into n >= 1 consecutive groups, n drawn with weight decay^(n - 1), the cuts evenly."""
    count = rng.choices(range(1, length + 1), [decay**n for n in range(length)])[0]
    cuts = [0, *sorted(rng.sample(range(1, length), count - 1)), length]
    return [end - start for start, end in zip(cuts, cuts[1:], strict=False)]


def reasoning(row: Row, setting: TaskSetting) -> list[Part]:
    """`thought` before a drawing (fields of `t2i_pretrain`) or an edit (`image_list`, its last the target).

    system prompt, sources, [prompt, thought learned] target. An edit's prompt is `instruction`, or one of the
    last alternatives of `instruction_list`. Prompt and thought are dropped together.
    """
    thought = _thinking(_field(row, "thought"))
    if row.get("image_list"):
        *sources, target = setting.pictures(row, "image_list")
        asked = row.get("instruction") or (_list(row, "instruction_list") or [None])[-1]
        prompt = _one_of(asked, "instruction", setting.rng)
    else:
        *sources, target = setting.pictures(row, "image")
        prompt = _caption(row, setting.rng)
    parts: list[Part] = [setting.text(THINK_BEFORE_DRAWING)]
    for source in sources:
        parts += setting.condition([source])
    if not setting.drops(setting.dropout.text):
        parts += [setting.text(prompt), setting.text(thought, loss=True)]
    return [*parts, setting.target(target)]


SIGNS: dict[str, Callable[[Row, TaskSetting], list[Part]]] = {
    "conversations": vlm_sft,
    "thought": reasoning,
    "image_list": unified_edit,
    "frames": video_interleaved,
    "video": video_interleaved,
    "texts": web_interleaved,
    "image": t2i_pretrain,
    "text": text,
}
"""The first of these fields that a row has tells its task, when nobody says it."""
TASKS = {task.__name__: task for task in (*SIGNS.values(), interleaved_und)}
UNDERSTANDING = {"vlm_sft", "interleaved_und"}
"""Tasks that look at pictures and draw none."""


def guess_task(row: Row) -> str:
    """The task that reads a row like this. ValueError when none does."""
    given = {name for name, value in row.items() if value is not None}
    for sign, task in SIGNS.items():
        if sign in given:
            only_read = sign == "texts" and not given & {"captions", "learned"}
            return (interleaved_und if only_read else task).__name__
    raise ValueError(f"no task reads the fields {sorted(given)}; expected one of {', '.join(SIGNS)}")
