"""The snippets of README.md and docs/ run, page by page, in the order in which a reader meets them.

```python blocks of a page share one namespace; in ```bash, ```sh and ```console blocks the lines that begin
with `openbagel ` (a prompt `$ ` may precede) run through the installed command. All of a page works in one
empty folder. A block tagged ```python no-run: reason stays out; NO_RUN bounds how many may.
"""

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if path.is_file())
WALKED = ROOT / "docs" / "train.md"
"""Takes minutes: tests/train/test_commands.py walks it."""
NO_RUN = 8
SHELLS = {"bash", "sh", "console"}
FENCE = re.compile(r"^([ ]*)```(\w+)?[ ]*([^\n`]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
SECONDS = 120


@dataclass(frozen=True, slots=True)
class Snippet:
    language: str
    tag: str
    code: str
    line: int


def snippets(text: str) -> list[Snippet]:
    found = []
    for match in FENCE.finditer(text):
        _, language, tag, code = match.groups()
        if language == "python" or language in SHELLS:
            line = text.count("\n", 0, match.start(4)) + 1
            found.append(Snippet(language, tag.strip(), textwrap.dedent(code), line))
    return found


def commands(code: str) -> Iterator[list[str]]:
    """The `openbagel` lines of a shell block as argument lists; a backslash continues a line."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["openbagel"]:
            yield words


def run_command(words: list[str], folder: Path) -> None:
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


def test_snippets_are_found() -> None:
    page = """
1. A list:
   ```bash
   $ openbagel generate "a b" \\
       -o out.png  # why
   make demo
   ```
```python no-run: needs a GPU
x = 1
```
```text
openbagel
```
"""
    shell, python = snippets(page)
    assert list(commands(shell.code)) == [["openbagel", "generate", "a b", "-o", "out.png"]]
    assert python == Snippet("python", tag="no-run: needs a GPU", code="x = 1\n", line=9)


def test_few_snippets_stay_out() -> None:
    tags = [f"{page.name}: {part.tag}" for page in PAGES for part in snippets(page.read_text()) if part.tag]
    assert [tag for tag in tags if not re.fullmatch(r"[^:]+: no-run: \S.*", tag)] == []
    assert len(tags) <= NO_RUN, "\n".join(tags)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != WALKED], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__snippet__"}
    for part in snippets(page.read_text()):
        if part.tag:
            continue
        if part.language == "python":
            padding = "\n" * (part.line - 1)
            exec(compile(padding + part.code, str(page), "exec"), namespace)
        else:
            for words in commands(part.code):
                run_command(words, tmp_path)
