"""Clips: what is fed is what training feeds, groups see what they should, and the verb that writes files."""

import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openbagel.data import tasks
from openbagel.data.samples import video_frames, video_header
from openbagel.flow import Guidance
from openbagel.inference import events
from openbagel.inference.pipeline import Bagel
from openbagel.picture_files import clip_writer, read_frames
from openbagel.sequence import Text
from tests import tiny
from tests.inference.feeding import assert_uncached, layout, photo, png, spied, trained_on, visible

GIVEN = [photo(seed) for seed in range(3)]
PROMPT = "a red circle"
THREE_WAYS = Guidance(text=3.0, image=2.0, interval=(0.0, 1.0))


@pytest.fixture
def bagel() -> Bagel:
    return tiny.bagel()


def bytes_of(frames: list[Image.Image]) -> list[bytes]:
    return [frame.tobytes() for frame in frames]


def test_frames_come_in_groups(bagel: Bagel) -> None:
    heard: list[events.Event] = []
    frames = bagel.using(listen=heard.append).continue_video(GIVEN, prompt=PROMPT, seed=3)
    assert [frame.size for frame in frames] == [(16, 12)] * 10
    assert all(frame.info["seed"] == 3 and "num_timesteps" in frame.info["settings"] for frame in frames)
    assert len(set(bytes_of(frames))) == 10
    previews = [event.latents.shape[:-2] for event in heard if isinstance(event, events.Preview)]
    assert previews == [(4,)] * 6 + [(2,)] * 3
    assert [event.picture for event in heard if isinstance(event, events.Picture)] == frames
    assert isinstance(heard[-1], events.Done)


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["no prompt", "prompt"])
@pytest.mark.parametrize(
    ("given", "num_frames", "group"), [(3, 10, None), (1, 5, None), (2, 3, 1), (0, 6, 3)]
)
def test_what_is_fed_is_what_training_feeds(
    bagel: Bagel, monkeypatch: pytest.MonkeyPatch, prompt: str | None, given: int, num_frames: int, group: Any
) -> None:
    if not (given or prompt):
        return
    with spied(bagel, monkeypatch) as spy:
        drawn = bagel.continue_video(GIVEN[:given], num_frames, prompt=prompt, group=group)
    held, forward, _ = spy.drawings[-1]
    size = group or 4
    sizes = [min(size, num_frames - first) for first in range(0, num_frames, size)]
    monkeypatch.setattr(tasks, "random_groups", lambda *_: sizes)
    words: dict[str, Any] = {"caption": prompt}
    if given:
        words = {"captions": [None] * (given - 1) + [prompt] + [None] * (num_frames - 1)}
    frames = [png(frame) for frame in (*GIVEN[:given], *drawn)]
    row = {"frames": frames, "given": given, **words}
    trained = visible(trained_on(tasks.video_interleaved, row))
    assert layout([*held, *forward.rows[-1].segments]) == layout(trained)


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["no prompt", "prompt"])
@pytest.mark.parametrize(
    ("given", "num_frames", "group"), [(3, 1, 1), (3, 4, 1), (1, 4, 2), (0, 3, 1), (0, 1, 1)]
)
def test_a_window_is_what_training_with_one_feeds(
    bagel: Bagel, monkeypatch: pytest.MonkeyPatch, prompt: str | None, given: int, num_frames: int, group: int
) -> None:
    if not (given or prompt):
        return

    def begins_anew(event: events.Event) -> None:
        if isinstance(event, events.Picture):
            spy.cond, spy.fed = None, []

    camera = bagel.with_settings(replace(bagel.config.settings, video_window=2)).using(listen=begins_anew)
    with spied(camera, monkeypatch) as spy:
        drawn = camera.continue_video(GIVEN[:given], num_frames, prompt=prompt, group=group)
    monkeypatch.setattr(tasks, "random_groups", lambda length, *_: [group] * (length // group))
    row = {"frames": [png(frame) for frame in (*GIVEN[:given], *drawn)], "given": given, "caption": prompt}
    trained = visible(trained_on(tasks.video_interleaved, row, window=2))
    held, forward, _ = spy.drawings[-1]
    assert layout([*held, *forward.rows[-1].segments]) == layout(trained)


@pytest.mark.parametrize("given", [0, 2])
def test_cached_groups_equal_a_forward_without_cache(
    bagel: Bagel, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    with spied(bagel, monkeypatch) as spy:
        bagel.continue_video(GIVEN[:given], 7, prompt=PROMPT, guidance=THREE_WAYS, group=3)
    said = Text(tiny.codec().encode(PROMPT))
    assert len(spy.drawings) == 3 * 3
    for number, (held, forward, velocities) in enumerate(spy.drawings):
        without = [segment for segment in held if segment != said]
        branches = [[said], without, held] if given or number >= 3 else [held, without]
        assert_uncached(bagel, forward, velocities, *branches)


def test_requests_run_together(bagel: Bagel) -> None:
    def requests() -> list[Any]:
        sampling = tiny.SAMPLING
        return [
            bagel.film_request([*GIVEN, PROMPT], num_frames=5, sampling=sampling, seed=1),
            bagel.film_request([PROMPT], num_frames=3, sampling=sampling, group=2),
            bagel.draw_request([PROMPT], size=None, seed=0, think=False, sampling=sampling),
        ]

    alone = [bagel.engine.drive(request) for request in requests()]
    together = bagel.engine.drive_all(requests())
    for one, other in zip(alone, together, strict=True):
        pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
        for a, b in pairs:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_a_clip_depends_on_what_is_given_and_on_the_seed_alone(bagel: Bagel) -> None:
    calm = {"num_frames": 2, "guidance": Guidance(text=1.5, interval=(0.0, 1.0), renorm_min=1.0)}
    torch.manual_seed(1)
    base = bytes_of(bagel.continue_video(GIVEN, prompt=PROMPT, **calm))
    torch.manual_seed(2)
    assert bytes_of(bagel.continue_video(GIVEN, prompt=PROMPT, **calm)) == base
    others = [
        bagel.continue_video(GIVEN, prompt=PROMPT, seed=1, **calm),
        bagel.continue_video(GIVEN[:2], prompt=PROMPT, **calm),
        bagel.continue_video(GIVEN, prompt="a blue square", **calm),
        bagel.continue_video(GIVEN, **calm),
        bagel.continue_video(prompt=PROMPT, size=(12, 16), **calm),
    ]
    assert all(bytes_of(other) != base for other in others)


def test_one_frame_is_drawn_as_a_picture_is(bagel: Bagel) -> None:
    (frame,) = bagel.continue_video(prompt=PROMPT, num_frames=1)
    assert frame.tobytes() == bagel.generate(PROMPT).tobytes()
    (after,) = bagel.continue_video(GIVEN[0], 1, prompt=PROMPT)
    assert after.tobytes() == bagel.edit(GIVEN[0], PROMPT).tobytes()


def test_without_a_prompt_nothing_warns_of_text_guidance(bagel: Bagel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(bagel.continue_video(GIVEN, 2)) == 2


def test_size_of_the_clip(bagel: Bagel) -> None:
    assert bagel.continue_video(prompt=PROMPT, num_frames=1)[0].size == (12, 8)
    assert bagel.continue_video(GIVEN, 1, size=(8, 20))[0].size == (20, 8)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([], {}, "nothing to film: give frames, a prompt, or both"),
        ([photo(), photo(size=(8, 8))], {}, r"different sizes \(16x12, 8x8\); give them all one size"),
        (GIVEN, {"num_frames": 0}, "num_frames 0 .* at least 1"),
        (GIVEN, {"group": 0}, "group 0 must be at least 1"),
        (GIVEN, {"size": (7, 8)}, "8x7"),
        ("no/such.mp4", {}, "no such video: no/such.mp4; give"),
        ("no/such.gif", {}, "no such picture: no/such.gif; give"),
    ],
)
def test_impossible_clips_are_refused(bagel: Bagel, frames: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bagel.continue_video(frames, **options)


def test_a_blind_model_films_nothing() -> None:
    config = tiny.config().understanding_only()
    blind = Bagel(replace(tiny.checkpoint(), autoencoder=None, config=config))
    with pytest.raises(ValueError, match="this model cannot draw: its autoencoder"):
        blind.continue_video(GIVEN)


# files ------------------------------------------------------------------------------------------------------


def shades(count: int = 5, size: tuple[int, int] = (32, 16)) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * i, 200 - 30 * i, 90)) for i in range(count)]


@pytest.mark.parametrize(("suffix", "error"), [(".gif", 0), (".mp4", 6)])
def test_written_clips_are_read_again(tmp_path: Path, suffix: str, error: int) -> None:
    path = tmp_path / "new" / f"clip{suffix}"
    clip_writer(path, 4.0)(shades())
    read = read_frames(path)
    assert [frame.size for frame in read] == [(32, 16)] * 5
    for frame, shade in zip(read, shades(), strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(shade)).max() <= error


@pytest.mark.parametrize(
    ("turn", "angle"), [((0, 1, -1, 0), -90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 90)]
)
def test_films_of_phones_are_turned_upright(tmp_path: Path, turn: tuple[int, ...], angle: int) -> None:
    """The matrix of an MP4 track says how its frames are to be shown."""
    frames = [photo(seed).resize((64, 48)) for seed in range(3)]
    flat, turned = tmp_path / "flat.mp4", tmp_path / "turned.mp4"
    clip_writer(flat, 4)(frames)
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    a, b, c, d = (one * number for number in turn)
    film, track = flat.read_bytes(), flat.read_bytes().index(b"tkhd")
    at = film.index(identity, track)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    turned.write_bytes(film[:at] + matrix + film[at + len(matrix) :])
    expected = [frame.rotate(angle, expand=True) for frame in read_frames(flat)]
    assert bytes_of(read_frames(turned)) == bytes_of(expected)
    assert video_header(turned) == (3, expected[0].size)
    (last,) = video_frames(turned, lambda length: (length - 1,))
    assert last.size == last.open().size == expected[0].size
    assert last.open().tobytes() == expected[-1].tobytes()


def test_clips_last_as_long_as_they_should(tmp_path: Path) -> None:
    import av

    for suffix in (".gif", ".mp4"):
        clip_writer(tmp_path / f"clip{suffix}", 2.5)(shades())
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.info["duration"] == 400
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 2.5
        assert container.streams.video[0].codec_context.name == "h264"


def test_paths_of_pictures_and_clips_are_frames(bagel: Bagel, tmp_path: Path) -> None:
    GIVEN[0].save(tmp_path / "one.png")
    clip_writer(tmp_path / "two.gif", 4.0)(shades(2, (16, 12)))
    shown = [GIVEN[0], *read_frames(tmp_path / "two.gif")]
    expected = bytes_of(bagel.continue_video(shown, 2))
    paths = [tmp_path / "one.png", str(tmp_path / "two.gif")]
    assert bytes_of(bagel.continue_video(paths, 2)) == expected
    assert bytes_of(bagel.continue_video(tmp_path / "two.gif", 2)) != expected


def test_long_and_damaged_files_are_refused(tmp_path: Path) -> None:
    clip_writer(tmp_path / "long.gif", 4.0)([photo(seed, (4, 4)) for seed in range(257)])
    with pytest.raises(ValueError, match="long.gif has more than 256 frames; cut it"):
        read_frames(tmp_path / "long.gif")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="bad.mp4 cannot be read as a video .*complete copy"):
        read_frames(tmp_path / "bad.mp4")


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [("clip.avi", 4, "clip.avi is no clip; end its name"), ("clip.gif", 0, "fps 0 must be above 0")],
)
def test_impossible_files_are_refused_before_drawing(name: str, fps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_writer(Path(name), fps)


def test_clips_that_cannot_be_kept_are_refused_before_drawing(tmp_path: Path) -> None:
    (tmp_path / "is.gif").mkdir()
    with pytest.raises(ValueError, match="is.gif cannot be written"):
        clip_writer(tmp_path / "is.gif", 4)
    (tmp_path / "p.png").touch()
    with pytest.raises(OSError, match=r"p.png"):
        clip_writer(tmp_path / "p.png" / "x.gif", 4)


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_writer(tmp_path / "clip.mp4", 4.0)(shades())
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    for attempt in (lambda: clip_writer(tmp_path / "x.mp4", 4.0), lambda: read_frames(tmp_path / "clip.mp4")):
        with pytest.raises(ValueError, match=r"needs av: pip install 'openbagel\[video\]'"):
            attempt()
    clip_writer(tmp_path / "clip.gif", 4.0)(shades())


def test_a_models_own_way_of_filming(bagel: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a text the guidance of pictures alone leads: image + s·(cond - image)."""
    guidance = Guidance(text=3.0, image=2.0, interval=(0.0, 1.0), renorm_min=1.0)
    settings = bagel.config.settings
    own = replace(settings, film=replace(settings.edit, guidance=guidance), video_group=1)
    camera = bagel.with_settings(own)
    with warnings.catch_warnings(), spied(camera, monkeypatch) as spy:
        warnings.simplefilter("error")
        drawn = camera.continue_video(GIVEN, 2, seed=3)
    rows = {len(forward.rows) for _, forward, _ in spy.drawings}
    assert rows == {2}  # what sees everything stands for what sees no text, too
    assert bytes_of(drawn) == bytes_of(bagel.continue_video(GIVEN, 2, seed=3, guidance=guidance, group=1))
    assert bytes_of(drawn) != bytes_of(bagel.continue_video(GIVEN, 2, seed=3, group=1))
    assert settings.filming(shown=True, told=True) == settings.edit
    assert settings.filming(shown=True, told=False) == settings.draw
    assert own.filming(shown=False, told=True) == own.film
