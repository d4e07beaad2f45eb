"""Tasks: what each makes of a row, the reference's odd rules, and rows that cannot be used."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openbagel.config import BagelConfig
from openbagel.data.samples import (
    BadRow,
    Draw,
    FrameSampler,
    Look,
    Part,
    Picture,
    Pixels,
    Role,
    decode,
    extent,
)
from openbagel.data.tasks import NEVER, PAPER, SCRIPT, TASKS, Dropout, TaskSetting, guess_task, random_groups
from openbagel.images import ImageLimits
from openbagel.sequence import Frame, Segment, Text, VaeImage, VitImage
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from tests.data.files import (
    document_row,
    edit_row,
    encoded,
    frames_row,
    picture,
    reasoning_row,
    t2i_row,
    vlm_row,
    write_video,
)
from tests.tiny import LIMITS, codec, config, packer

SETTING = TaskSetting(codec=codec(), vae=LIMITS, vit=LIMITS, dropout=NEVER)
ALWAYS = Dropout(1, 1, 1)


def parts_of(task: str, row: dict, seed: int | str = 0, **options: Any) -> list[Part]:
    return TASKS[task](row, replace(SETTING, rng=random.Random(seed), **options))


def sketch(parts: list[Part]) -> list[str]:
    """Parts in words: texts ("!" when learned), what pictures are for ("-" when dropped)."""

    def word(part: Part) -> str:
        if isinstance(part, Text):
            return codec().decode(part.ids) + "!" * part.loss
        if isinstance(part, Look):
            return "look" if part.picture else "-look"
        return part.role.value + str(len(part.pictures)) if part.pictures else "-draw"

    return [word(part) for part in parts]


def contents(parts: list[Part]) -> list[bytes]:
    """The pictures of all parts in order."""
    pictures = [p for part in parts for p in _pictures(part)]
    return [p.content for p in pictures if isinstance(p.content, bytes)]


def _pictures(part: Part) -> list[Picture]:
    if isinstance(part, Draw):
        return list(part.pictures)
    return [part.picture] if isinstance(part, Look) and part.picture else []


def encode(parts: list[Part], model: BagelConfig) -> list[Segment]:
    """As the trainer does, with zeros for latents."""
    segments: list[Segment] = []
    for part in decode(parts):
        if not isinstance(part, Pixels):
            segments.append(part)
            continue
        frames = []
        for pixels in part.frames:
            grid = (pixels.shape[1] // model.latent_stride, pixels.shape[2] // model.latent_stride)
            tokens = torch.zeros(grid[0] * grid[1], model.latent_channels)
            target = None if part.role is Role.CONDITION else tokens
            frames.append(Frame(tokens, grid, target, part.position_step))
        frames[-1:] = [replace(frame, position_step=0) for frame in frames[-1:]]
        segments.append(VaeImage(tuple(frames), t=0.5, hidden=part.role is Role.TARGET))
    return segments


# every task ------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, list[dict]]:
    """Rows of every task; paths are absolute."""
    write_video(tmp_path / "clip.mp4", frames=20)
    for seed in range(4):
        picture(seed, (40, 24)).save(tmp_path / f"{seed}.png")
    paths = [str(tmp_path / f"{seed}.png") for seed in range(4)]
    turns = [{"from": "human", "value": "<video> what?"}, {"from": "gpt", "value": "this", "thought": "hm"}]
    video = str(tmp_path / "clip.mp4")
    return {
        "t2i_pretrain": [t2i_row(0), {"image": {"bytes": None, "path": paths[0]}, "text": "one"}],
        "unified_edit": [edit_row(0), edit_row(1, 5), edit_row(2, 2)],
        "vlm_sft": [vlm_row(0, paths[0]), vlm_row(1, paths[1:4]), {"video": video, "conversations": turns}],
        "text": [{"text": "a plain document"}],
        "interleaved_und": [document_row(0)],
        "web_interleaved": [document_row(0), document_row(1)],
        "video_interleaved": [
            frames_row(0),
            frames_row(1, 1),
            {"video": video, "captions": ["it fades"] * 3},
        ],
        "reasoning": [reasoning_row(0), reasoning_row(1)],
    }


@pytest.mark.parametrize("dropout", [NEVER, SCRIPT, ALWAYS])
def test_counted_tokens_are_packed_tokens(rows: dict[str, list[dict]], dropout: Dropout) -> None:
    assert rows.keys() == TASKS.keys()
    for task, row in ((task, row) for task, some in rows.items() for row in some):
        for seed in range(8):
            parts = parts_of(task, row, seed, dropout=dropout, text_loss=seed % 2 == 0)
            pack = packer().pack([encode(parts, config())])
            assert extent(parts, config()).tokens == len(pack), (task, sketch(parts))


def test_parts_are_a_function_of_row_and_generator(rows: dict[str, list[dict]]) -> None:
    for task, some in rows.items():
        for row in some:
            drawn = [[parts_of(task, row, seed, dropout=PAPER) for seed in range(20)] for _ in range(2)]
            assert drawn[0] == drawn[1]


def test_typed_markers_stay_text(rows: dict[str, list[dict]]) -> None:
    markers = {codec().start, codec().end, codec().vision_start, codec().vision_end}
    evil = "<|im_end|><|vision_start|>"
    assert markers.isdisjoint(parts_of("text", {"text": evil})[0].ids)  # pyright: ignore
    for part in parts_of("t2i_pretrain", {**t2i_row(0), "captions": json.dumps({"a": evil})}):
        assert not isinstance(part, Text) or markers.isdisjoint(part.ids)


def test_dropouts_are_as_published() -> None:
    assert PAPER == Dropout(text=0.1, vit=0.5, vae=0.1)
    assert SCRIPT == Dropout(text=0.1, vit=0.3, vae=0.3)
    with pytest.raises(ValueError, match="lie in 0 … 1"):
        Dropout(1.5, 0, 0)


def test_conditions_are_dropped_one_by_one() -> None:
    drawn = [parts_of("unified_edit", edit_row(0, 2), seed, dropout=PAPER) for seed in range(800)]
    sketches = [sketch(parts) for parts in drawn]
    assert {tuple(s[:2]) for s in sketches} == {
        (draw, look) for draw in ("condition1", "-draw") for look in ("look", "-look")
    }
    assert abs(sum("-draw" in s for s in sketches) / 800 - 0.1) < 0.04
    assert abs(sum("-look" in s for s in sketches) / 800 - 0.5) < 0.06
    assert abs(sum(len(s) == 3 for s in sketches) / 800 - 0.1) < 0.04
    assert all(s[-1] == "target1" for s in sketches)


# text to image ---------------------------------------------------------------------------------------------


def test_a_caption_is_drawn_at_random() -> None:
    drawn = [parts_of("t2i_pretrain", t2i_row(3), seed) for seed in range(20)]
    long = "a black circle number 3 above a square"
    assert {tuple(sketch(parts)) for parts in drawn} == {
        ("a black circle number 3", "target1"),
        (long, "target1"),
    }
    assert contents(drawn[0]) == [t2i_row(3)["image"]]
    assert sketch(parts_of("t2i_pretrain", t2i_row(3), dropout=ALWAYS)) == ["target1"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"captions": "{}"}, " "),
        ({"captions": {"a": "one", "b": None}}, "one"),
        ({"captions": ["one"]}, "one"),
        ({"caption": "one", "captions": None}, "one"),
        ({"text": "one"}, "one"),
        ({"caption": ["one"]}, "one"),
    ],
)
def test_captions_come_in_many_shapes(fields: dict, said: str) -> None:
    assert sketch(parts_of("t2i_pretrain", {"image": encoded(0), **fields})) == [said, "target1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"captions": "a plain caption"},
            "'captions' is no JSON object.*'a plain caption'.*write {\"caption\"",
        ),
        ({"captions": "3"}, "'captions' is no JSON object: 3"),
        ({"captions": "[" * 5000}, r"'captions' is no JSON object: '\[\[\["),
        ({"caption": "x", "image": "long/" * 1000}, "'image': .*long"),
        ({"captions": '{"a": 3}'}, "'captions' is no text but 3"),
        ({"txt": "x"}, "'captions' or 'caption' or 'text' is missing.*the row has image, txt"),
        ({"caption": "x", "image": None}, "'image' is missing"),
        ({"caption": "x", "image": "gone.png"}, "'image': no such picture: .*gone.png"),
        ({"caption": "x", "image": b"no picture"}, "'image': .*not a picture"),
        ({"caption": "x", "image": 3}, "'image' holds no picture but 3; give its bytes"),
        ({"caption": "x", "image": {"bytes": None, "path": None}}, "'image' holds no picture"),
    ],
)
def test_bad_text_to_image_rows(row: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parts_of("t2i_pretrain", {"image": encoded(0), **row})


def test_a_misspelt_field_is_told() -> None:
    with pytest.raises(BadRow, match="'image' is missing; did you mean 'images'"):
        parts_of("t2i_pretrain", {"images": encoded(0), "text": "x"})


def test_truncated_pictures_fail_when_they_are_decoded() -> None:
    parts = parts_of("t2i_pretrain", {"image": encoded(0, (64, 64), "JPEG")[:-60], "text": "x"})
    with pytest.raises(ValueError, match="damaged or truncated"):
        decode(parts)


# edits -----------------------------------------------------------------------------------------------------


def edit_outcomes(count: int) -> Counter[tuple[str, ...]]:
    """The reference's rules written as a list of all cases, each with its probability."""
    cases: Counter[tuple[str, ...]] = Counter()
    for start in range(count - 1):
        ends = [end for end in (start + 1, start + 2) if end < count]
        for end in ends:
            share = 1 / (count - 1) / len(ends)
            source = (f"condition {start}", f"look {start}")
            steps = [f"s{i}" for i in range(start, end)]
            if end == start + 1:
                cases[*source, steps[0], f"target {end}"] += share
                continue
            middle = f"{start + 1}"
            copies = (f"target {middle}", f"condition {middle}", f"look {middle}")
            cases[*source, steps[0], *copies, steps[1], f"target {end}"] += share / 2
            if end == count - 1:
                cases[*source, f"{steps[0]}.", f"target {middle}"] += share / 2
            else:
                cases[*source, f"{steps[0]}. {steps[1]}.", f"target {end}"] += share / 2
    return cases


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_edits_follow_the_rules_of_the_reference(count: int) -> None:
    row = {**edit_row(0, count), "instruction_list": [[f"s{i}"] for i in range(count - 1)]}

    def outcome(seed: int) -> tuple[str, ...]:
        words = []
        for part, name in zip(parts := parts_of("unified_edit", row, seed), sketch(parts), strict=True):
            shown = [row["image_list"].index(p.content) for p in _pictures(part)]
            words.append(f"{name.rstrip('1')} {shown[0]}" if shown else name)
        return tuple(words)

    expected, drawn = edit_outcomes(count), Counter(map(outcome, range(1200)))
    assert drawn.keys() == expected.keys()
    assert all(abs(drawn[case] / 1200 - share) < 0.05 for case, share in expected.items())


def test_an_alternative_of_each_instruction_is_drawn() -> None:
    said = {sketch(parts_of("unified_edit", edit_row(0, 2), seed))[2] for seed in range(20)}
    assert said == {"step 0 of 0", "do 0 of 0"}
    plain = {**edit_row(0, 2), "instruction_list": ["only one"]}
    assert sketch(parts_of("unified_edit", plain))[2] == "only one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_list": [encoded(0)]}, "'image_list' has 1 pictures; write two or more"),
        ({"image_list": encoded(0)}, "'image_list' has 1 pictures"),
        ({"instruction_list": [["a"]]}, "'instruction_list' has 1 entries; write 2"),
        ({"instruction_list": [[], []]}, r"'instruction_list' is no text but \[\]"),
        ({"instruction_list": None}, "'instruction_list' is missing"),
        ({"image_list": [b"", b"", b""]}, r"'image_list\[[01]\]'.*not a picture"),
    ],
)
def test_bad_edit_rows(change: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parts_of("unified_edit", {**edit_row(0), **change})


# understanding ---------------------------------------------------------------------------------------------


def test_conversations_are_split_at_the_marks(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    turns = [
        {"from": "human", "value": "<image>\n compare <image> please "},
        {"from": "gpt", "value": " same "},
        {"from": "human", "value": " sure? "},
        {"from": "gpt", "value": "yes <image>"},
    ]
    row = {"image": ["a.png", "b.png"], "conversations": turns}
    parts = parts_of("vlm_sft", row, folder=tmp_path, dropout=ALWAYS)
    said = ["look", "compare", "look", "please", " same !", " sure? ", "yes <image>!"]
    assert sketch(parts) == said
    assert [part.num_images for part in parts if isinstance(part, Look)] == [2, 2]
    assert sketch(parts_of("vlm_sft", {"conversations": turns[2:]})) == said[-2:]


def test_thoughts_stand_before_the_answer() -> None:
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4", "thought": "count"}]
    parts = parts_of("vlm_sft", {"conversations": turns})
    assert sketch(parts) == [THINK_BEFORE_ANSWERING, "2 + 2?", "<think>count</think>4!"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": [encoded(0)] * 2}, "has 1 marks for 2 pictures; write one <image> for each"),
        ({"image": None}, "has 1 marks for 0 pictures"),
        ({"conversations": [{"from": "human", "value": "<image> hm"}]}, "holds nothing to learn"),
        ({"conversations": [{"from": "user", "value": "hm"}]}, "comes from none of human, gpt, system"),
        ({"conversations": [{"from": "gpt"}]}, "'conversations' is no text but None"),
        ({"conversations": ["hm"]}, "'hm' comes from none of"),
        ({"conversations": None}, "'conversations' is missing"),
        ({"image": None, "video": "gone.mp4"}, "'video': no such video: gone.mp4"),
    ],
)
def test_bad_conversations(row: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parts_of("vlm_sft", {**vlm_row(0, "0.png"), "image": encoded(0), **row})


def test_documents_are_read_in_order() -> None:
    learned = ["page 0 begins!", "look", "then it goes on!", "look", "and ends!"]
    assert sketch(parts_of("interleaved_und", document_row(0), dropout=ALWAYS)) == learned
    assert sketch(parts_of("text", {"text": "a plain document"})) == ["a plain document!"]
    for task, row in (("text", {"text": ""}), ("interleaved_und", {"texts": [None], "images": [encoded(0)]})):
        with pytest.raises(BadRow, match="nothing to learn"):
            parts_of(task, row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [None]}, "'images' has 1 entries; write 5"),
        ({"texts": [None] * 5}, "'texts' and 'images' at 0: write null in one"),
        ({"captions": ["a"]}, "'captions' has 1 entries; write 5"),
        ({"images": [None, 3, None, None, None]}, r"'images\[1\]' holds no picture but 3"),
        ({"texts": [7, None, "b", None, "c"]}, r"'texts\[0\]' is no text but 7"),
    ],
)
def test_bad_documents(change: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parts_of("web_interleaved", {**document_row(0), **change})


# video and web ---------------------------------------------------------------------------------------------


def test_captions_stand_before_their_picture() -> None:
    first = ["page 1 begins", "a green circle number 1", "target1", "condition1", "look", "then it goes on"]
    second = ["a blue circle number 51".replace("blue", "black"), "target1"]
    assert sketch(parts_of("web_interleaved", document_row(1))) == [*first, *second]
    learned = sketch(parts_of("web_interleaved", document_row(1), text_loss=True, dropout=ALWAYS))
    assert [word for word in learned if "!" in word] == [
        "page 1 begins!",
        "a green circle number 1!",
        "then it goes on!",
        "a black circle number 51!",
        "and ends!",
    ]
    assert learned[-4:] == ["target1", "-draw", "-look", "and ends!"]


def test_a_picture_that_begins_a_document_is_given() -> None:
    row = {"texts": [None, "more", None], "images": [encoded(0), None, encoded(1)]}
    assert sketch(parts_of("web_interleaved", row)) == ["condition1", "look", "more", "target1"]
    with pytest.raises(BadRow, match="nothing to learn"):
        parts_of("web_interleaved", {"texts": [None, "more"], "images": [encoded(0), None]})


def test_clean_history() -> None:
    """One frame a group: each is learned, then given to what follows; the first is given."""
    seed = next(s for s in range(100) if random_groups(3, _after_one_draw(s), 1.0) == [1, 1, 1])
    parts = sketch(parts_of("video_interleaved", frames_row(0, 3), seed, noisy_history=0.0))
    moves = ["the circle moves 0", "the circle moves 1"]
    given = ["condition1", "look"]
    assert parts == [*given, moves[0], "target1", *given, moves[1], "target1"]
    led = {**frames_row(0, 3), "caption": "once"}
    assert sketch(parts_of("video_interleaved", led, seed, noisy_history=0.0))[:2] == ["once", "target1"]


def _after_one_draw(seed: int) -> random.Random:
    rng = random.Random(seed)
    rng.random()
    return rng


def test_every_clip_ends_in_a_target_and_shows_each_frame() -> None:
    row = frames_row(0, 5)
    seen = set()
    for seed in range(300):
        parts = parts_of("video_interleaved", row, seed)
        draws = [part for part in parts if isinstance(part, Draw)]
        assert draws[-1].role is (Role.TARGET if len(draws[-1].pictures) == 1 else Role.GROUP)
        noisy = any(draw.role is Role.GROUP for draw in draws[:-1])
        seen.add((noisy, len(draws[-1].pictures)))
        history = [d for d in draws[:-1] if d.role is (Role.GROUP if noisy else Role.CONDITION)]
        assert [p.content for d in [*history, draws[-1]] for p in d.pictures] == row["frames"]
        assert not noisy or not any(isinstance(part, Look) for part in parts)
        said = [codec().decode(part.ids) for part in parts if isinstance(part, Text)]
        assert said == row["captions"]
    assert seen >= {(noisy, size) for noisy in (True, False) for size in (1, 2, 3, 4)}


@pytest.mark.parametrize("given", [0, 2])
def test_a_window_shows_the_last_frames_before_any_group(given: int) -> None:
    row = {"frames": frames_row(0, 6)["frames"], "caption": "once", "given": given}
    seen = set()
    for seed in range(300):
        said, *parts = parts_of("video_interleaved", row, seed, window=2)
        assert isinstance(said, Text) and codec().decode(said.ids) == "once"
        *shown, drawn = [part for part in parts if isinstance(part, Draw)]
        assert drawn.role is (Role.TARGET if len(drawn.pictures) == 1 else Role.GROUP)
        history = [picture.content for draw in shown for picture in draw.pictures]
        assert all(draw.role is Role.CONDITION for draw in shown) and len(shown) <= 1
        first = row["frames"].index(drawn.pictures[0].content)
        end = first + len(drawn.pictures)
        assert [p.content for p in drawn.pictures] == row["frames"][first:end]
        assert history == row["frames"][max(0, first - 2) : first]
        assert sum(isinstance(part, Look) for part in parts) == len(history)
        seen.add(first)
    assert seen == set(range(given, 6))
    changes = parts_of("video_interleaved", frames_row(0, 6), 1, window=2, group_decay=1e9)
    said = [codec().decode(part.ids) for part in changes if isinstance(part, Text)]
    drawn = [part for part in changes if isinstance(part, Draw)][-1]
    last = frames_row(0, 6)["frames"].index(drawn.pictures[0].content)
    assert said == [f"the circle moves {change}" for change in range(max(0, last - 2), last)]


def test_with_a_window_every_frame_is_learned_as_often() -> None:
    row = {"frames": frames_row(0, 6)["frames"], "given": 2}
    drawn = [parts_of("video_interleaved", row, seed, window=2, group_decay=1e9)[-1] for seed in range(800)]
    learned = Counter(part.pictures[0].content for part in drawn if isinstance(part, Draw))
    assert set(learned) == set(row["frames"][2:]) and all(160 < count < 240 for count in learned.values())


def test_half_of_the_histories_are_noised() -> None:
    drawn = [parts_of("video_interleaved", frames_row(0, 2), seed, group_decay=1e9) for seed in range(400)]
    noisy = sum(isinstance(p[0], Draw) and p[0].role is Role.GROUP for p in drawn)
    assert abs(noisy / 400 - 0.5) < 0.08


@pytest.mark.parametrize("step", [1, 3])
def test_a_dropped_group_keeps_its_positions(step: int) -> None:
    row = {**frames_row(0, 4), "frame_step": step}
    for seed in range(40):
        whole = parts_of("video_interleaved", row, seed, noisy_history=0.0)
        if not any(isinstance(part, Draw) and part.role is Role.CONDITION for part in whole):
            continue
        without: list[Part] = []
        for part in whole:
            if isinstance(part, Draw) and part.role is Role.CONDITION:
                options = replace(SETTING, dropout=Dropout(0, 0, 1))
                without += options.condition(part.pictures, step)[: -len(part.pictures)]
            else:
                without.append(part)
        ends = [packer().pack([encode(parts, config())]).next_positions for parts in (whole, without)]
        assert ends[0] == ends[1]
        assert len(sketch(without)) >= len(sketch(whole))


def test_random_groups() -> None:
    rng = random.Random(0)
    drawn = [random_groups(4, rng, 1.0) for _ in range(4000)]
    assert {tuple(groups) for groups in drawn} == {
        (4,), (1, 3), (2, 2), (3, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 1, 1, 1)
    }  # fmt: skip
    counts = Counter(map(len, drawn))
    assert all(abs(counts[n] / 4000 - 0.25) < 0.03 for n in range(1, 5))
    counts = Counter(len(random_groups(3, rng, 0.5)) for _ in range(7000))
    assert [round(counts[n] / 1000) for n in (1, 2, 3)] == [4, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["a"]}, "'captions' has 1 entries; write 3"),
        ({"frames": []}, "'video' is missing"),
        ({"frame_step": 0.5}, "'frame_step' is 0.5"),
        ({"captions": [3, "a", "b"]}, "'captions' is no text but 3"),
    ],
)
def test_bad_clips(change: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parts_of("video_interleaved", {**frames_row(0), **change})


# thinking --------------------------------------------------------------------------------------------------


def test_thinking_before_drawing_and_editing() -> None:
    thought = "<think>the user wants a red circle number 0</think>!"
    drawing = [THINK_BEFORE_DRAWING, "a red circle number 0", thought, "target1"]
    assert sketch(parts_of("reasoning", reasoning_row(0))) == drawing
    thought = "<think>the user wants a green circle number 1</think>!"
    editing = [THINK_BEFORE_DRAWING, "condition1", "look", "make it blue", thought, "target1"]
    assert sketch(parts_of("reasoning", reasoning_row(1))) == editing
    official = {**edit_row(0, 3), "thought": "hm", "instruction_list": [["first"], ["second"]]}
    expected = [THINK_BEFORE_DRAWING, *["condition1", "look"] * 2, "second", "<think>hm</think>!", "target1"]
    assert sketch(parts_of("reasoning", official)) == expected
    dropped = [THINK_BEFORE_DRAWING, "-draw", "-look", "target1"]
    assert sketch(parts_of("reasoning", reasoning_row(1), dropout=ALWAYS)) == dropped
    with pytest.raises(BadRow, match="'thought' is missing"):
        parts_of("reasoning", t2i_row(0))


# video files -----------------------------------------------------------------------------------------------


def test_a_video_shows_as_many_frames_as_asked(rows: dict[str, list[dict]]) -> None:
    two = FrameSampler(max_num_frames=2, min_num_frames=2)
    words = sketch(parts_of("vlm_sft", rows["vlm_sft"][2], frames=two))
    assert words == [THINK_BEFORE_ANSWERING, "look", "look", "what?", "<think>hm</think>this!"]
    draws = [
        p
        for p in parts_of("video_interleaved", {"video": rows["vlm_sft"][2]["video"]}, frames=two)
        if isinstance(p, Draw)
    ]
    assert {p.indices for d in draws for p in d.pictures} and len({p for d in draws for p in d.pictures}) == 2  # pyright: ignore


def test_guessing_a_task(rows: dict[str, list[dict]]) -> None:
    for task in rows.keys() - {"interleaved_und"}:
        assert {guess_task(row) for row in rows[task]} == {task}
    assert guess_task({"texts": [], "images": [], "captions": None}) == "interleaved_und"
    with pytest.raises(ValueError, match=r"\['a', 'b'\]; expected one of"):
        guess_task({"b": 1, "a": 1, "text": None})


def test_without_a_vit_looks_count_as_dropped() -> None:
    parts = parts_of("unified_edit", edit_row(0, 2), vit=None)
    assert sketch(parts)[:2] == ["condition1", "-look"]
    big = replace(SETTING, vit=ImageLimits(64, 8, 4), rng=random.Random(0))
    looked = TASKS["unified_edit"](edit_row(0, 2), big)[1]
    assert isinstance(looked, Look) and looked.limits.max_size == 64
    assert isinstance(decode([looked])[0], VitImage)
