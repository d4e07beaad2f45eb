"""What benchmarks share: published facts, rows of published files, questions made of published instructions,
and replies that are read by rule.

The instructions to judges are their authors': they are read from the benchmarks' own files when these are
run, and no code of such a file is.
"""

import ast
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from openbagel.checks import check_choice, retold
from openbagel.config import read_yaml
from openbagel.evals.base import Desk, Made, Sample, Suite, Summary, Verdict, mean
from openbagel.evals.judges import Reply
from openbagel.picture_files import open_picture, picture_size

Read = Callable[[str], tuple[float, ...] | None]
Worth = Callable[[str, dict[str, float]], dict[str, float]]
"""Scores of a group's name and all that judges said."""

FACTS = read_yaml(
    Path(__file__).parents[1] / "assets" / "benchmarks.yaml", "benchmarks", "install the package anew"
)
SEED = 42
NUMBER = r"(\[[\d\s,.]+\]|\d+(?:\.\d+)?)"
"""Or a list of them, of which the least counts."""


def suite(
    name: str, samples: Callable[[Path], Iterable[Sample]], score: Any, summary: Summary, **more: Any
) -> Suite:
    """A benchmark, with the facts of benchmarks.yaml: what it needs, its published settings and rows. What
    `samples` cannot read is told with what is needed.
    """
    facts = dict(FACTS[name])
    if data := facts.pop("data", {}):
        facts["needs"] = f"{', '.join((*data['files'], *data.get('texts', ())))} from {data['where']}"
    rows = dict(facts.pop("rows", {"values": ()}))
    names = rows.pop("values")
    known = {model: zip(names, row, strict=False) for model, row in rows.items()}
    told = {model: {value: x for value, x in row if x is not None} for model, row in known.items()}

    def read(data: Path) -> Iterator[Sample]:
        with retold(f"{{error}}; {name} needs {facts['needs']}", ValueError):
            yield from samples(data)

    made = {"samples": read, "score": score, "summary": summary, "reply": "image", "published": told}
    return Suite(name=name, **facts, **{**made, **more})


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked about one sample: `read` finds scores of these names in its reply.

    pictures: files, None for what was made, and texts between them, in order. largest: their longest side in
    pixels, if bounded. matched: all are brought to the size of the first. system: what the judge is told
    before.
    """

    text: str
    pictures: tuple[Path | str | None, ...]
    names: tuple[str, ...]
    read: Read
    largest: int | None = None
    matched: bool = False
    system: str = ""

    def shown(self, made: Made, desk: Desk) -> list[Any]:
        shown: list[Any] = []
        for part in self.pictures:
            if not isinstance(part, str):
                part = open_picture(part) if part else desk.picture(made)
                part = part.resize(shown[0].size) if self.matched and shown else part
                part.thumbnail((self.largest, self.largest) if self.largest else part.size)
            shown.append(part)
        return shown


def judged(sample: Sample, made: Made, desk: Desk, *, worth: Worth) -> Verdict:
    """Puts the questions in `truth` to the judge; `worth` makes scores of all that was read."""
    assert desk.judge is not None
    said: dict[str, float] = {}
    replies: list[Reply] = []
    verdict = Verdict(id=sample.id, group=sample.group)
    for question in sample.truth["questions"]:
        try:
            pictures = question.shown(made, desk)
        except ValueError as error:
            return replace(verdict, problem=f"broken picture: {error}", replies=tuple(replies))
        values, some = desk.judge.decide(question.text, pictures, question.read, question.system)
        replies += some
        if values is None:
            return replace(verdict, problem=f"unreadable reply: {question.names}", replies=tuple(replies))
        said |= zip(question.names, values, strict=True)
    return replace(verdict, scores=worth(sample.group, said), replies=tuple(replies))


# published files --------------------------------------------------------------------------------------------


def text_of(path: Path) -> str:
    with retold(f"{path} cannot be read ({{error}})", OSError, UnicodeDecodeError):
        return path.read_text("utf-8")


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places: of a JSON list or object, or of JSONL, where a broken line is None."""
    text = text_of(path)
    if path.suffix != ".jsonl":
        with retold(f"{path} is no valid JSON ({{error}})", ValueError):
            tree = json.loads(text)
        yield from tree.items() if isinstance(tree, dict) else ((str(i), row) for i, row in enumerate(tree))
        return
    for place, line in enumerate(text.splitlines()):
        try:
            yield str(place), json.loads(line)
        except ValueError:
            yield str(place), None


def instructions(path: Path, *names: str) -> dict[str, str]:
    """The texts that a Python file gives names to; under "" its longest f-string, `x["Slot"]` as {Slot}; as
    "system" the text of an OpenAI-shaped message's part that has no slots.

    ValueError when it lacks one of `names`.
    """
    with retold(f"{path} is no Python file ({{error}})", SyntaxError):
        tree = ast.parse(text_of(path))
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                found[name] = text
            case ast.Dict(values=[ast.Constant(value="text"), ast.Constant(value=str(text))]):
                found["system"] = text
            case ast.JoinedStr(values=parts):
                found[""] = max("".join(map(_piece, parts)), found.get("", ""), key=len)
    for name in names:
        check_choice(f"{path}: of the texts,", name, found)
    return found


def _piece(part: Any) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    return "{" + re.findall(r"\w*", ast.unparse(part.value).rstrip("'\"])"))[-2] + "}"


def filled(template: str, **slots: str) -> str:
    """A text with its slots `{name}` and `<name>` filled, once; doubled braces stand for one."""

    def one(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        return slots.get(name, found[0]) if name else found[0][0]

    return re.sub(r"\{\{|\}\}|\{(\w+)\}|<(\w+)>", one, template)


def samples_of(places: Iterable[tuple[str, Any]], make: Callable[[Any], Sample]) -> Iterator[Sample]:
    """A sample for each row; what is wrong with a row, or with a picture that it names, is its problem."""
    seen: set[str] = set()
    for place, row in places:
        try:
            sample = make(row)
            if sample.id in seen or ".." in Path(sample.file).parts or Path(sample.file).is_absolute():
                raise ValueError(f"id {sample.id!r} stands twice, or is no name of a file")
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            yield Sample(id=f"row {place}", problem=f"broken row: {error!r}")
            continue
        seen.add(sample.id)
        asked = [part for question in sample.truth.get("questions", ()) for part in question.pictures]
        try:
            for path in dict.fromkeys(part for part in (*sample.parts, *asked) if isinstance(part, Path)):
                picture_size(path)
        except ValueError as error:
            sample = replace(sample, problem=f"broken picture: {error}")
        yield sample


def unpacked(data: Path, content: bytes, *, double: bool = False) -> Path:
    """The file of a picture that stood inside another file, named for what is in it: below the data, or, when
    that cannot be written, in the temporary folder. double: twice as wide and as high.
    """
    place = data / ".unpacked" if os.access(data, os.W_OK) else Path(tempfile.gettempdir()) / "openbagel"
    path = place / f"{hashlib.sha256(content).hexdigest()}{'-2' if double else ''}"
    if not path.is_file():
        place.mkdir(exist_ok=True)
        if double:
            picture, file = open_picture(content), io.BytesIO()
            larger = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BILINEAR)
            larger.save(file, "PNG", compress_level=1)
            content = file.getvalue()
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(path)
    return path


# replies and scores -----------------------------------------------------------------------------------------


def reader(*patterns: str, low: float, high: float, count: int = 1) -> Read:
    """Reads the first `count` numbers (or least ones of lists) that each pattern's group finds, in any case;
    None unless all are there and in range: nothing is guessed.
    """

    def read(reply: str) -> tuple[float, ...] | None:
        found = [re.findall(pattern, reply, re.IGNORECASE | re.MULTILINE)[:count] for pattern in patterns]
        texts = [re.findall(r"\d+(?:\.\d+)?", text) for some in found for text in some]
        values = tuple(min(map(float, some), default=math.nan) for some in texts)
        right = len(values) == count * len(patterns) and all(low <= value <= high for value in values)
        return values if right else None

    return read


def named(*names: str, low: float, high: float) -> Read:
    """Reads the number behind each name, with nothing between but quotes, stars, spaces and a colon."""
    mark = r"s?[\"'*\s]*[:：=]?[\"'*\s]*"
    return reader(*(name.replace("_", r"[_\s]*") + mark + NUMBER for name in names), low=low, high=high)


def means(verdicts: Sequence[Verdict], score: str, groups: Iterable[str] | None = None) -> dict[str, float]:
    """The mean of each group, else of each that there is; NaN where there is nothing."""
    groups = sorted({verdict.group for verdict in verdicts}) if groups is None else groups
    return {group: mean(verdicts, score, group) for group in groups}


def average(values: Iterable[float]) -> float:
    """The mean of those that there are; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
