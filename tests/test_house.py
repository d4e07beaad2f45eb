"""The gates of the house: sizes, clones, import direction, quiet imports, exemptions, tracked files.

Each test names the place that breaks its rule. The verbs and options of the command line are pinned in
test_cli.py, the snippets of the documentation run in test_docs.py, the wheel is tried in test_package.py.
"""

import ast
import importlib
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "openbagel"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

STAGE = "evaluation"
CODE_LINES = {
    "core": 4_000,
    "training": 8_200,
    "full world": 10_400,
    "devices and formats": 11_500,
    "serving": 13_400,
    "evaluation": 15_400,
}
"""Planned were 7,000 after training, 8,000 with the full world, 9,500 with devices and formats, 11,000 with
serving, 12,000 in all. Eight kinds of data with their doctor and converter, every official flag, the start
from published parts, adapters and checkpoints for any number of ranks took 1,000 more; 35 kinds of exercises
with their truths, a judge for turned and overlapping objects, clips and conversations that the model leads as
much again. World, data and training gave 900 lines back before five formats, streaming, memory and
transformers took 2,000; those gave 150 back. A server with limits that hold, a page and a cluster took 1,900
instead of 1,500; 34 benchmarks with their own rules of reading and scoring, none of which may be left out,
1,600 instead of 1,000; clips by windows, videos of phones, verdicts of parts and questions in turns 90; odd
input, cut videos, full disks and damaged runs, each told in a line, 120.
What is over the plan is what it did not count; nothing in it is unused (no function that only tests call) or
doubled.
"""
FILE_LINES = 600
FUNCTION_LINES = 80
CLONE_WINDOW = 10
CLONE_SHARE = 0.03
TRACKED_BYTES = 45 * 2**20
TRACKED_FILE_BYTES = 15 * 2**20
FORBIDDEN_WORDS = ("/".join(("", "work", "")), "/".join(("..", "shared")))

LAYERS = (
    {"cli"},
    {"verbs"},
    {"integrations", "serve", "train", "evals", "demo"},
    {"inference", "data", "world", "memory", "placement"},
    {"doctor", "lora", "pretrained", "quantize", "dfloat11", "gguf_files", "weights", "hub"},
    {"model"},
    {"sequence", "attention", "flow", "images", "picture_files", "tokens", "config", "files", "checks"},
)
FREE_ROOMS = {"integrations", "serve"}
MODULE_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
# (file, rule): a rule switched off in the package, where a foreign interface demands it
EXEMPTIONS = {("openbagel/integrations/transformers.py", "PLR0913")}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PACKAGE_FILES = python_files("openbagel")
ALL_FILES = PACKAGE_FILES + python_files("tests", "benchmarks", "examples", "recipes")


# counting --------------------------------------------------------------------------------------------------


def docstring_rows(source: str) -> set[int]:
    """The rows of strings that stand alone: docstrings of modules, classes, functions and fields."""
    alone = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    strings = (node for node in alone if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {row for node in strings for row in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def code_lines(source: str) -> list[str]:
    """The lines that hold code, without comments and docstrings, white space normalised."""
    pieces: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and token.string.strip():
            for offset, piece in enumerate(token.string.split("\n")):
                pieces[token.start[0] + offset] += piece.split()
    silent = docstring_rows(source)
    return [" ".join(pieces[row]) for row in sorted(pieces) if pieces[row] and row not in silent]


def clone_share(files: dict[str, list[str]]) -> tuple[float, list[str]]:
    """Share of code lines inside a window that occurs more than once, and where those windows start."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, lines in files.items():
        for start in range(len(lines) - CLONE_WINDOW + 1):
            places[tuple(lines[start : start + CLONE_WINDOW])].append((name, start))
    copies = [place for spots in places.values() if len(spots) > 1 for place in spots]
    cloned = {(name, start + offset) for name, start in copies for offset in range(CLONE_WINDOW)}
    total = sum(map(len, files.values()))
    return len(cloned) / max(total, 1), [f"{name}: {files[name][start]}" for name, start in copies]


def test_the_counters_count() -> None:
    body = "\n".join(f"step_{i} = {i}" for i in range(CLONE_WINDOW))
    plain = f'"""Doc\n\nstring."""\n\n# comment\n{body}\ntext = """a\n\nb"""  # why\n'
    lines = code_lines(plain)
    assert lines[0] == "step_0 = 0"
    assert lines[-2:] == ['text = """a', 'b"""']
    assert len(lines) == CLONE_WINDOW + 2
    spaced = code_lines(body.replace(" = ", "  =  ").replace("\n", "  # why\n\n"))
    assert clone_share({"a": lines, "b": []})[0] == 0
    assert clone_share({"a": lines, "b": spaced})[0] == 2 * CLONE_WINDOW / (2 * CLONE_WINDOW + 2)


# sizes -----------------------------------------------------------------------------------------------------


def test_files_are_short() -> None:
    counts = {name_of(path): len(path.read_text().splitlines()) for path in ALL_FILES}
    assert {name: count for name, count in counts.items() if count > FILE_LINES} == {}


def test_functions_are_short() -> None:
    counts = {
        f"{name_of(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in ALL_FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: count for name, count in counts.items() if count > FUNCTION_LINES} == {}


def test_package_is_small_and_says_things_once() -> None:
    files = {name_of(path): code_lines(path.read_text()) for path in PACKAGE_FILES}
    assert sum(map(len, files.values())) <= CODE_LINES[STAGE]
    share, copies = clone_share(files)
    assert share < CLONE_SHARE, "\n".join(copies)


def test_there_is_no_drawer() -> None:
    assert [name_of(path) for path in PACKAGE_FILES if path.stem in {"util", "utils"}] == []


# signatures and exemptions ---------------------------------------------------------------------------------


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") or node.name in {"__init__", "__call__"}:
                yield node


def annotated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    returns = node.returns is not None or node.name == "__init__"
    return returns and all(arg.annotation or arg.arg in {"self", "cls"} for arg in named)


def test_public_signatures_are_annotated() -> None:
    bare = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in PACKAGE_FILES
        for node in public_functions(ast.parse(path.read_text()).body)
        if not annotated(node)
    ]
    assert bare == []


def test_exemptions_are_listed() -> None:
    found = {
        (name_of(path), rule)
        for path in PACKAGE_FILES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type == tokenize.COMMENT and "noqa" in token.string
        for rule in re.findall(r"[A-Z]+[0-9]+", token.string) or ["everything"]
    }
    assert found == EXEMPTIONS


# imports ---------------------------------------------------------------------------------------------------


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imported(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether loading the module runs it) of every import of a file, lazy ones too."""
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    later = [node for node in ast.walk(tree) if isinstance(node, functions) or is_type_checking(node)]
    lazy = {id(node) for parent in later for node in ast.walk(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno, id(node) not in lazy) for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def depth(room: str) -> int | None:
    return next((index for index, rooms in enumerate(LAYERS) if room in rooms), None)


def test_every_room_is_known() -> None:
    rooms = {room_of(path) for path in PACKAGE_FILES} - {"__init__", "__main__"}
    assert sorted(room for room in rooms if depth(room) is None) == []


def test_imports_point_one_way() -> None:
    wrong = []
    for path in PACKAGE_FILES:
        here = depth(room_of(path)) or 0
        for name, line, _ in imported(path):
            room = name.split(".")[1] if name.startswith("openbagel.") else None
            if room not in {None, "__version__"} and (depth(room) is None or depth(room) < here):
                wrong.append(f"{name_of(path)}:{line} {name}")
    assert wrong == []


def distribution(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0]


def test_modules_need_core_dependencies_only() -> None:
    core = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    allowed = {MODULE_NAMES.get(name, name) for name in core} | sys.stdlib_module_names | {"openbagel"}
    foreign = [
        f"{name_of(path)}:{line} {name}"
        for path in PACKAGE_FILES
        if room_of(path) not in FREE_ROOMS
        for name, line, at_import in imported(path)
        if at_import and name.split(".")[0] not in allowed
    ]
    assert foreign == []


def run_python(code: str) -> str:
    """What a fresh interpreter prints, both streams; it must end well."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_the_package_is_free() -> None:
    heavy = "sorted({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert run_python(f"import openbagel, sys; print({heavy})") == "[]\n"


def test_importing_every_module_is_quiet() -> None:
    """With the extras out of reach: a name set to None in sys.modules cannot be imported."""
    extras = {distribution(line) for lines in PROJECT["optional-dependencies"].values() for line in lines}
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE_FILES
        if room_of(path) not in FREE_ROOMS and path.stem != "__main__"
    ]
    extras -= {"openbagel"}  # extras that name one another
    block = f"import importlib, sys; sys.modules.update(dict.fromkeys({sorted(extras)}))"
    assert run_python(f"{block}\nfor name in {modules}: importlib.import_module(name)") == ""


# files in the repository -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository_files() -> list[Path]:
    """Files that git tracks or is about to: everything it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_repository_is_light(repository_files: list[Path]) -> None:
    sizes = {name_of(path): path.stat().st_size for path in repository_files}
    assert {name: size for name, size in sizes.items() if size > TRACKED_FILE_BYTES} == {}
    assert sum(sizes.values()) <= TRACKED_BYTES


def test_repository_speaks_of_itself(repository_files: list[Path]) -> None:
    found = []
    for path in repository_files:
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{name_of(path)}: {word}" for word in FORBIDDEN_WORDS if word.encode() in content]
    assert found == []


def test_ci_runs_both_suites() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert [line for line in script.read_text().splitlines() if line.startswith("make")] == [
        "make test",
        "make test-slow",
    ]


@pytest.mark.parametrize("path", python_files("benchmarks"), ids=lambda path: path.stem)
def test_benchmarks_import(path: Path) -> None:
    """They run by hand only; what they use must still be there."""
    importlib.import_module(f"benchmarks.{path.stem}")
