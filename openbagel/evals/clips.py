"""Clips: questions about videos by their frames, and frames that should follow given ones.

No benchmark's own files but two plain layouts that anything can be brought into; both are lines of JSON.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openbagel.data.samples import video_frames
from openbagel.evals import answers
from openbagel.evals.base import Desk, Made, Sample, Suite, Verdict, mean
from openbagel.evals.questions import rows, samples_of, unpacked
from openbagel.picture_files import open_picture, png

SHOWN = 8
"""Frames of a video that are shown, evenly spread."""
LETTERS = "ABCDEFGHIJ"


def _samples(data: Path, name: str, make: Any) -> Iterator[Sample]:
    return samples_of(rows(data / name), partial(make, data))


def _spread(length: int) -> tuple[int, ...]:
    return tuple(sorted({(2 * part + 1) * length // (2 * SHOWN) for part in range(SHOWN)}))


def _frames(data: Path, row: dict[str, Any]) -> Iterable[Path]:
    """The pictures in `frames`, or frames of `video`, written once."""
    if "frames" in row:
        return [data / name for name in row["frames"]]
    found: list[Path] = []
    for frame in video_frames(data / row["video"], _spread):
        found.append(unpacked(data, png(frame.open())))
    return found


# questions --------------------------------------------------------------------------------------------------


def _asked(data: Path, row: dict[str, Any]) -> Sample:
    options = dict(zip(LETTERS, row.get("options", ()), strict=False))
    listed = [f"{letter}. {option}" for letter, option in options.items()]
    told = "the option's letter from the given choices directly" if options else "with one word"
    text = "\n".join([row["question"], *listed, f"Answer {told}."])
    truth = {"answer": row["answer"], "options": options}
    if options and row["answer"] not in options:
        raise ValueError(f"answer {row['answer']!r} is none of {[*options]}")
    group = str(row.get("group", ""))
    return Sample(id=str(row["id"]), parts=(*_frames(data, row), text), group=group, truth=truth)


def _answered(sample: Sample, made: Made, desk: Desk) -> Verdict:
    """By its letter, else word for word but for case and marks; "unread" where no option is named."""
    options, right = sample.truth["options"], sample.truth["answer"]
    said = answers.letter(made.text, options) if options else made.text.strip(" .!\n").lower()
    scores = {"right": float(said == (right if options else right.lower())), "unread": float(said is None)}
    return Verdict(id=sample.id, group=sample.group, scores=scores, reason=f"right is {right!r}")


def _accuracy(verdicts: Sequence[Verdict]) -> dict[str, float]:
    groups = sorted({verdict.group for verdict in verdicts} - {""})
    told = {"all": 100 * mean(verdicts, "right"), "unread": 100 * mean(verdicts, "unread")}
    return told | {group: 100 * mean(verdicts, "right", group) for group in groups}


VIDEO_QA = Suite(
    name="video-qa",
    about=f"questions about videos, by {SHOWN} of their frames",
    needs="questions.jsonl (lines of id, video or frames, question, answer; options, group) and its files",
    samples=partial(_samples, name="questions.jsonl", make=_asked),
    score=_answered,
    summary=_accuracy,
    options={"max_tokens": 20, "temperature": 0.0},
)

# frames to come ---------------------------------------------------------------------------------------------


def _begun(data: Path, row: dict[str, Any]) -> Sample:
    paths = [data / name for name in (*row["frames"], *row["next"])]
    given, truth = paths[: len(row["frames"])], paths[len(row["frames"]) :]
    prompt = [row["prompt"]] if row.get("prompt") else []
    known = {"id": str(row["id"]), "group": str(row.get("group", "")), "seed": int(row.get("seed", 0))}
    return Sample(
        parts=(*given, *prompt), frames=len(truth), truth={"next": truth, "last": given[-1]}, **known
    )


def _followed(sample: Sample, made: Made, desk: Desk) -> Verdict:
    """Mean absolute errors of the frames, from 0 to 1; "still": that of the last given frame shown on."""
    drawn = desk.frames(made)
    like = drawn[0]
    truth = [_values(open_picture(path), like) for path in sample.truth["next"]]
    last = _values(open_picture(sample.truth["last"]), like)
    off = [_values(one, like) - right for one, right in zip(drawn, truth, strict=True)]
    errors, squares = [abs(one).mean() for one in off], np.mean([(one**2).mean() for one in off])
    scores = {"error": np.mean(errors), "first error": errors[0], "last error": errors[-1]}
    scores |= {"still": np.mean([abs(last - right).mean() for right in truth])}
    scores |= {"PSNR": -10 * math.log10(max(squares, 1e-10))}
    told = {name: float(value) for name, value in scores.items()}
    return Verdict(id=sample.id, group=sample.group, scores=told)


def _values(picture: Image.Image, like: Image.Image) -> Any:
    sized = picture if picture.size == like.size else picture.resize(like.size, Image.Resampling.BICUBIC)
    return np.asarray(sized.convert("RGB"), np.float64) / 255


def _errors(verdicts: Sequence[Verdict]) -> dict[str, float]:
    names = ("error", "first error", "last error", "still", "PSNR")
    return {name: mean(verdicts, name) for name in names}


NEXT_FRAMES = Suite(
    name="next-frames",
    about="frames that follow given ones, beside a clip that stands still",
    needs="clips.jsonl (lines of id, frames, next; prompt, seed, group) and the pictures it names",
    samples=partial(_samples, name="clips.jsonl", make=_begun),
    score=_followed,
    summary=_errors,
    reply="film",
)
