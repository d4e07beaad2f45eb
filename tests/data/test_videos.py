"""Frames of video files: which are there, decoded where they are asked for; clips cut short, and damage."""

import random
from pathlib import Path

import pytest

from openbagel.data.samples import FrameSampler, evenly, video_frames, video_header
from tests.data.files import cut_video, write_video


def test_frames_are_decoded_where_they_were_asked_for(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=20)
    assert video_header(path) == (20, (32, 16))
    frames = video_frames(path, lambda _: (0, 7, 19))
    assert [frame.size for frame in frames] == [(32, 16)] * 3
    shades = [frame.open().convert("L").resize((1, 1)).getpixel((0, 0)) for frame in frames]
    assert all(abs(shade - 10 * index) < 6 for shade, index in zip(shades, (0, 7, 19), strict=True))


@pytest.mark.parametrize("first", [5, 12], ids=["edit list", "inside a group of pictures"])
@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_a_clip_cut_without_encoding_is_whole(tmp_path: Path, first: int, ending: str) -> None:
    """Of 40 frames, 0 and 20 whole ones. From 5 on: the first ones are stored, to be decoded and not shown.
    From 12 on: the first shown are lost, for those that they build on were left out.
    """
    source = write_video(tmp_path / "whole.mp4", frames=40, codec="libx264")
    path = cut_video(source, tmp_path / f"cut{ending}", first, keep_before=first == 5)
    frames = video_frames(path, lambda length: tuple(range(length)))
    shades = [frame.open().convert("L").resize((1, 1)).getpixel((0, 0)) for frame in frames]
    wanted = range(20 if first == 12 else 5 if ending == ".mp4" else 0, 40)
    assert shades == pytest.approx([5 * index for index in wanted], abs=6)

    path = cut_video(source, tmp_path / f"end{ending}", 22, keep_before=False)
    with pytest.raises(ValueError, match="no frame"):
        video_frames(path, lambda length: (length - 1,))[0].open()


@pytest.mark.parametrize("fast_start", [False, True])
def test_a_damaged_video_is_named(tmp_path: Path, fast_start: bool) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=20, fast_start=fast_start)
    content = path.read_bytes()
    frames = video_frames(path, lambda _: (0, 19))
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=r"clip\.mp4 is truncated" if fast_start else r"clip\.mp4 cannot"):
        frames[0].open()
    path = tmp_path / "b.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"b\.mp4 cannot be read as a video"):
        video_header(path)


def test_the_frame_sampler() -> None:
    rng = random.Random(0)
    sampler = FrameSampler(max_num_frames=12, min_num_frames=8)
    drawn = [sampler.indices(100, rng) for _ in range(200)]
    assert {len(indices) for indices in drawn} == {8, 9, 10, 11, 12}
    assert all(list(indices) == sorted(set(indices)) and indices[-1] < 100 for indices in drawn)
    assert sampler.indices(5, rng) == (0, 1, 2, 3, 4)
    middle = FrameSampler(max_num_frames=2, min_num_frames=2, sample="middle")
    assert middle.indices(10, rng) == (2, 7)
    assert evenly(3, 20) == (0, 9, 19) and evenly(1, 20) == (0,)
    with pytest.raises(ValueError, match="min_num_frames 9"):
        FrameSampler(max_num_frames=8, min_num_frames=9)
    with pytest.raises(ValueError, match="'midle' is none of .*; did you mean 'middle'"):
        FrameSampler(sample="midle")
