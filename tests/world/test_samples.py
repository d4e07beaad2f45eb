"""The world as data: exercises as rows, rows as parts, and parts as inference feeds the same exercise."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

from openbagel.config import Sampling
from openbagel.data.samples import Draw, Look, Part, Picture, Pixels, Role, SampleId, decode, extent
from openbagel.data.tasks import NEVER, TASKS, TaskSetting
from openbagel.hub import NANO
from openbagel.inference.engine import Forward
from openbagel.inference.pipeline import Bagel
from openbagel.sequence import Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from openbagel.train.latents import LatentEncoder
from openbagel.weights import load_checkpoint
from openbagel.world import tasks
from openbagel.world.exercise import Draws, Example, Films, Said, Shown, Writes
from openbagel.world.render import render_picture
from openbagel.world.rows import renderings, row
from openbagel.world.samples import Mixture, WorldDataset, world_named
from openbagel.world.scene import nano_world

WORLD = nano_world()
KINDS = [kind for kind in tasks.TASKS if kind != "tell_text"]


@cache
def bagel() -> Bagel:
    one = Bagel(load_checkpoint(NANO, dtype=torch.float32))
    quick = Sampling(max_tokens=1, max_think_tokens=1, num_timesteps=2)
    settings = replace(one.config.settings, draws_by_itself=True)
    one.config = replace(one.config, settings=settings)
    return one.using(quick)


def dataset(kind: str, **options: Any) -> WorldDataset:
    free = {"text_dropout": 0, "vit_dropout": 0, "vae_dropout": 0, "think": 0, "think_kinds": 0}
    mixture = Mixture(kinds={kind: 1.0}, **{**free, **options})
    return WorldDataset(kind, WORLD, mixture, bagel().config, bagel().codec)


def sketch(parts: list[Part] | list[Segment]) -> list[str]:
    """Parts in words: texts ("!" when learned), what pictures are for ("-" when dropped)."""

    def word(part: Any) -> str:
        if isinstance(part, Text):
            return bagel().codec.decode(part.ids) + "!" * part.loss
        if isinstance(part, Look):
            return "look" if part.picture else "-look"
        return f"{part.role.value}{len(part.pictures)}" if part.pictures else "-draw"

    return [word(part) for part in parts]


# rows -------------------------------------------------------------------------------------------------------


def test_every_kind_is_a_row_of_an_ordinary_task() -> None:
    found = {kind: row(tasks.example(WORLD, 0, 0, kind), 64)[0] for kind in tasks.TASKS}
    tasks_of = {
        "draw": {"t2i_pretrain"},
        "ask": {"vlm_sft"},
        "edit": {"unified_edit", "web_interleaved"},
        "think": {"t2i_pretrain", "unified_edit", "vlm_sft"},
        "tell": {"web_interleaved", "text"},
        "film": {"video_interleaved"},
        "walk": {"web_interleaved"},
    }
    for group, expected in tasks_of.items():
        assert {task for kind, task in found.items() if kind.startswith(f"{group}_")} == expected
    assert found["edit_turns"] == "web_interleaved" and found["edit_add"] == "unified_edit"
    thinking = {kind: row(tasks.example(WORLD, 0, 0, kind), 64, True)[0] for kind in tasks.TASKS}
    assert thinking["think_draw"] == thinking["think_edit"] == thinking["draw_one"] == "reasoning"
    assert thinking["think_ask"] == "vlm_sft" and thinking["edit_turns"] == "web_interleaved"


def test_parts_are_a_function_of_row_and_generator() -> None:
    for kind in tasks.TASKS:
        data = dataset(kind, think=0.5, think_kinds=0.5, text_dropout=0.3, vit_dropout=0.3, vae_dropout=0.3)
        ids = [SampleId(data.name, epoch, 3) for epoch in range(6)]
        twice = [[data.parts(id.row, id.random(0, "parts")) for id in ids] for _ in range(2)]
        assert twice[0] == twice[1]


def test_a_rendering_knows_its_size_and_is_rendered_when_opened() -> None:
    scene = WORLD.sample_scene(random.Random(0), 2)
    (picture,), (same,) = renderings([Shown(scene)], 64), renderings([Shown(scene)], 64)
    assert isinstance(picture, Picture) and picture.size == (64, 64)
    assert "pictures" not in vars(picture.gallery)
    assert picture == same
    assert picture.open().tobytes() == render_picture(scene, 64).tobytes() and picture.gallery.pictures
    limits = bagel().config.settings.vae_limits
    setting = TaskSetting(codec=bagel().codec, vae=limits, vit=None, dropout=NEVER)
    assert setting.picture(picture, "image") is picture


# what is learned --------------------------------------------------------------------------------------------


def test_order_of_the_first_kinds() -> None:
    for kind in ("draw_two", "ask_count", "edit_add"):
        made = tasks.example(WORLD, 0, 5, kind)
        (prompt,) = (step.words for step in made.steps if isinstance(step, Said))
        answer = [f"{step.words}!" for step in made.steps if isinstance(step, Writes)]
        plain, thinking = (sketch(dataset(kind, think=p).parts(5, random.Random(0))) for p in (0, 1))
        if kind == "draw_two":
            assert plain == [prompt, "target1"]
            assert thinking[:2] == [THINK_BEFORE_DRAWING, prompt] and thinking[3:] == ["target1"]
            assert thinking[2].startswith("<think>") and thinking[2].endswith("</think>!")
        elif kind == "ask_count":
            assert plain == ["look", prompt, *answer]
            assert thinking[:3] == [THINK_BEFORE_ANSWERING, "look", prompt]
            assert thinking[3].startswith("<think>") and thinking[3].endswith(f"</think>{answer[0]}")
        else:
            assert plain == ["condition1", "look", prompt, "target1"]
            assert thinking[:4] == [THINK_BEFORE_DRAWING, "condition1", "look", prompt]


def test_dropouts_copies_and_thoughts_come_as_often_as_asked() -> None:
    data = dataset("edit_add", think=0.2, text_dropout=0.1, vit_dropout=0.3, vae_dropout=0.4, copies=3)
    counts: Counter[str] = Counter()
    for index in range(600):
        parts = data.parts(index, random.Random(index))
        words = sketch(parts)
        counts += Counter(set(words) & {"-look", "-draw", THINK_BEFORE_DRAWING})
        counts["text"] += any(isinstance(p, Text) for p in parts if p != parts[0] or len(words) == 4)
        last = parts[-1]
        assert isinstance(last, Draw) and last.role is Role.TARGET and last.copies == 3
    assert abs(counts["-look"] / 600 - 0.3) < 0.06 and abs(counts["-draw"] / 600 - 0.4) < 0.06
    assert abs(counts[THINK_BEFORE_DRAWING] / 600 - 0.2) < 0.05
    asked = [dataset("ask_count", text_dropout=1, vit_dropout=1).parts(i, random.Random(i)) for i in range(9)]
    assert all(sketch(parts)[0] == "look" and len(parts) == 3 for parts in asked)
    hard = dataset("think_draw", think_kinds=0.5)
    thinks = sum(len(hard.parts(i, random.Random(i))) == 4 for i in range(400))
    assert abs(thinks / 400 - 0.5) < 0.08


def test_turns_see_what_was_drawn_before() -> None:
    made = tasks.example(WORLD, 0, 0, "edit_turns")
    said = [step.words for step in made.steps if isinstance(step, Said)]
    seen = ["condition1", "look"]
    expected = [
        *seen,
        said[0],
        *(word for words in said[1:] for word in ("target1", *seen, words)),
        "target1",
        *seen,
    ]
    *parts, end = dataset("edit_turns").parts(0, random.Random(0))
    assert sketch(parts) == expected and end == Text((bagel().codec.end_of_text or 0,), loss=True, bare=True)


def test_some_drawings_and_edits_teach_their_end() -> None:
    for kind in ("draw_one", "edit_add"):
        data, plain = dataset(kind, ends=0.3), dataset(kind)
        many = [data.parts(i, random.Random(i)) for i in range(200)]
        ended = [parts for parts in many if parts[-1] == Text((bagel().codec.end_of_text or 0,), True, True)]
        assert abs(len(ended) / 200 - 0.3) < 0.08
        for parts in ended:
            assert sketch(parts[:-1])[-3:] == ["target1", "condition1", "look"]
        assert all(isinstance(plain.parts(i, random.Random(i))[-1], Draw) for i in range(20))
    asked = dataset("ask_count", ends=1.0)
    assert len(asked.parts(0, random.Random(0))) == 3


def test_a_story_learns_texts_pictures_and_its_end() -> None:
    data = dataset("tell_story")
    parts = data.parts(0, random.Random(0))
    words = sketch(parts)
    assert not words[0].endswith("!") and words[-1] == "the end.!"
    for place, word in enumerate(words):
        if word == "target1":
            assert words[place + 1 : place + 3] == ["condition1", "look"]
    ends_drawn = tasks.example(WORLD, 0, 0, "tell_story")
    ends_drawn = replace(ends_drawn, steps=ends_drawn.steps[:-1])
    task, fields = row(ends_drawn, 64)
    limits = bagel().config.settings.vae_limits
    end = bagel().codec.end_of_text
    assert end is not None
    parts = TASKS[task](fields, TaskSetting(codec=bagel().codec, vae=limits, vit=limits, dropout=NEVER))
    assert sketch(parts[:-1])[-3:] == ["target1", "condition1", "look"]
    assert parts[-1] == Text((end,), loss=True, bare=True)
    encoder = LatentEncoder(bagel().pictures.autoencoder, bagel().config, seed=0)
    segments = encoder.segments([sample(parts)])
    pack = Packer(bagel().config, bagel().codec, marker_loss=True).pack(segments)
    assert end in pack.labels.tolist()


def sample(parts: list[Part]) -> Any:
    from openbagel.data.samples import Sample

    return Sample(SampleId("world", 0, 0), decode(parts))


# clips ------------------------------------------------------------------------------------------------------


def test_given_frames_are_clean_and_each_group_comes_next_at_some_time() -> None:
    data, first = dataset("film_move", group_decay=1.0), Counter[tuple[str, int]]()
    for index in range(400):
        parts = data.parts(index, random.Random(index))
        draws = [part for part in parts if isinstance(part, Draw)]
        assert draws[0].role is Role.CONDITION and len(draws[0].pictures) == 3
        assert sketch(parts)[1:4] == ["look"] * 3
        assert draws[-1].role is not Role.CONDITION
        noisy = any(draw.role is Role.GROUP for draw in draws[1:-1])
        first[("noisy" if noisy else "clean", len(draws))] += 1
        learned = [d for d in draws if d.role is not Role.CONDITION]
        assert not noisy or sum(len(draw.pictures) for draw in learned) == 10
    after_three = first["clean", 2]
    assert 0.1 < after_three / 400 < 0.5


# what is trained is what is run -----------------------------------------------------------------------------


def fed(made: Example, think: bool) -> list[Segment]:
    """What inference feeds the context of its answer or its picture, up to what it makes first."""
    heard: list[Any] = []
    one, steps = bagel(), [step for step in made.without_thought().steps]
    while isinstance(step := steps.pop(0), Said | Shown):
        heard.append(step.words if isinstance(step, Said) else render_picture(step.view, 64))
    sampling = one.config.settings.draw
    if made.decides:
        request: Any = one.interleave_request(heard, size=None, seed=0, think=think)
    elif isinstance(step, Writes):
        request = one.write_request(heard, seed=0, think=think)
    elif isinstance(step, Films):
        request = one.film_request(heard, num_frames=2, sampling=sampling)
    else:
        request = one.draw_request(heard, size=None, seed=0, think=think, sampling=sampling)
    segments: list[Segment] = []
    item = next(request)
    while isinstance(item, Forward) and not any(
        isinstance(s, VaeImage) and s.t or isinstance(s, Text) and s.bare
        for r in item.rows
        for s in r.segments
    ):
        segments += item.rows[0].segments
        item = request.send(tuple(one.engine.step([item]))[0])
    request.close()
    return segments


@pytest.mark.parametrize("kind", KINDS)
def test_training_shows_what_inference_shows(kind: str) -> None:
    thinks = kind.startswith(("draw", "ask", "edit_a", "think")) and kind != "ask_turns"
    for think in {False, thinks}:
        made = tasks.example(WORLD, 0, 1, kind)
        data = dataset(kind, think=float(think), think_kinds=float(think))
        trained = list(decode(data.parts(1, random.Random(1))))
        run = fed(made, think)
        assert run
        for segment, part in zip(run, trained, strict=False):
            if isinstance(segment, Text):
                assert isinstance(part, Text) and part.ids == segment.ids and not part.loss
            elif isinstance(segment, VitImage):
                assert isinstance(part, VitImage)
                assert part.pixels is not None and torch.equal(part.pixels, segment.pixels)  # pyright: ignore
            else:
                assert isinstance(part, Pixels) and part.role is Role.CONDITION
                assert len(part.frames) == len(segment.frames)
        rest = trained[len(run) :]
        learns = rest[0]
        assert learns.loss if isinstance(learns, Text) else isinstance(learns, Pixels)


def test_counted_tokens_are_packed_tokens() -> None:
    packer = Packer(bagel().config, bagel().codec)
    encoder = LatentEncoder(bagel().pictures.autoencoder, bagel().config, seed=0)
    for kind in tasks.TASKS:
        parts = dataset(kind, copies=2).parts(2, random.Random(2))
        assert extent(parts, bagel().config).tokens == len(packer.pack(encoder.segments([sample(parts)]))), (
            kind
        )


# choices ----------------------------------------------------------------------------------------------------


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"kind 'draw_on' is none of .*; did you mean 'draw_one'"):
        Mixture(kinds={"draw_on": 1})
    with pytest.raises(ValueError, match=r"world 'ful' is none of nano, full; did you mean 'full'"):
        Mixture(kinds={}, world="ful")
    assert world_named("nano") == nano_world()


def test_pictures_are_those_of_the_world() -> None:
    made = tasks.example(WORLD, 0, 0, "draw_one")
    part = dataset("draw_one").parts(0, random.Random(0))[-1]
    assert isinstance(part, Draw)
    (step,) = (step for step in made.steps if isinstance(step, Draws))
    opened = part.pictures[0].open()
    assert isinstance(opened, Image.Image)
    assert opened.tobytes() == render_picture(step.view, 64).tobytes()
