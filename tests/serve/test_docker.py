"""The Dockerfile, read: what it copies is there, what it runs is understood, and it does not run as root."""

import json
import re
import shlex
from pathlib import Path

import pytest

from openbagel.cli import parser_for
from openbagel.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION = re.compile(r"([A-Z]+)\s+(.*)", re.DOTALL)
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]


def instructions() -> list[tuple[str, str]]:
    lines = (line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    found = [
        INSTRUCTION.fullmatch(line) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line
    ]
    return [(match[1], match[2]) for match in found if match]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def parsed(words: list[str]) -> dict[str, object]:
    """What `openbagel` makes of a command line; SystemExit where it does not understand it."""
    return vars(parser_for(words[0]).parse_strictly(words[1:]))


def test_every_line_is_an_instruction() -> None:
    known = "ARG FROM ENV WORKDIR COPY RUN USER EXPOSE HEALTHCHECK ENTRYPOINT CMD".split()
    assert {name for name, _ in instructions()} == {*known}
    assert [name for name, _ in instructions()][:2] == ["ARG", "FROM"]


def test_what_it_copies_is_there_and_not_ignored() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = [source for one in of("COPY") for source in one.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert {source.split("/")[0] for source in copied} == let_in


def test_what_changes_most_comes_last() -> None:
    steps = [f"{name} {rest}" for name, rest in instructions()]
    order = [
        "COPY constraints",
        "RUN pip install --no-deps --index",
        "COPY openbagel/__init__",
        "COPY openbagel ",
    ]
    places = [next(i for i, step in enumerate(steps) if step.startswith(one)) for one in order]
    assert places == sorted(places)
    assert "${TORCH_INDEX}" in steps[places[1]]


def test_extras_exist_and_torch_is_pinned() -> None:
    extras = next(one.partition("=")[2] for one in of("ARG") if one.startswith("EXTRAS"))
    told = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", told, re.MULTILINE) for extra in extras.split(","))
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_it_serves_and_not_as_root() -> None:
    (user,), (entry,), (command,) = of("USER"), of("ENTRYPOINT"), of("CMD")
    assert user not in ("root", "0") and any(
        f"useradd --create-home --uid 1000 {user}" in run for run in of("RUN")
    )
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :]
    assert json.loads(entry) == ["openbagel"]
    asked = parsed(json.loads(command))
    assert (asked["host"], asked["port"], asked["insecure"]) == ("0.0.0.0", 8000, False)
    (check,) = of("HEALTHCHECK")
    assert f"127.0.0.1:{asked['port']}/health" in check
    assert str(asked["port"]) in of("EXPOSE")[0].split()
    compile(json.loads(check.partition("CMD")[2])[2], "HEALTHCHECK", "exec")


def commands() -> list[list[str]]:
    """What the pages' `docker run … openbagel VERB …` lines give to `openbagel`."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^docker run .*", text, re.MULTILINE)]
    images = [next(i for i, word in enumerate(line) if word.startswith("openbagel")) for line in lines]
    return [line[i + 1 :] for line, i in zip(lines, images, strict=True)]


def test_documented_containers_start() -> None:
    assert any(commands())
    for words in filter(None, commands()):
        assert words[0] in VERBS and parsed(words)


@pytest.mark.parametrize("words", [["serve", "--hots", "0.0.0.0"], ["serve", "--port", "x"]])
def test_a_wrong_command_would_be_seen(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(words)
