"""The verb `video`: files in, a file out, errors in one line with exit code 2."""

from pathlib import Path

import pytest

from openbagel import cli
from openbagel.picture_files import read_frames

QUICK = ["--num-timesteps", "3", "--num-frames", "3"]


def test_video_writes_a_gif_and_goes_on_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gif, film = tmp_path / "new" / "a.gif", tmp_path / "b.mp4"
    assert cli.main(["video", *QUICK, "--prompt", "a red circle moves right", "-o", str(gif)]) == 0
    assert [frame.size for frame in read_frames(gif)] == [(64, 64)] * 3
    more = ["--include-given", "--fps", "8", "--size", "32x64", "-o", str(film)]
    assert cli.main(["video", str(gif), *QUICK, *more]) == 0
    assert [frame.size for frame in read_frames(film)] == [(32, 64)] * 6
    assert capsys.readouterr().out.split() == [str(gif), str(film)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to film: give FRAMES, --prompt TEXT, or both"),
        (["--prompt", "x", "-o", "x.webm"], "x.webm is no clip; end its name with .gif or .mp4"),
        (["none.png"], "no such picture: none.png"),
        (["--prompt", "x", "--think"], "--think has no effect on clips"),
        (["--prompt", "x", "--num-frames", "0"], "num_frames 0"),
        (["--prompt", "x", "--fps", "-1"], "fps -1.0 must be above 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["video", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
