"""A wheel of this tree, installed into a fresh environment of each supported Python, draws with nano."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
VERSIONS = ("3.11", "3.12")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
FREE_BYTES = 8 * 2**30
SECONDS = 1200
# torch from the place the Makefile was told, else from wherever pip looks
INDEX = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Output of a command that must succeed, run without any trace of this environment's Python."""
    ours = ("PYTHON", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def interpreter(version: str) -> str | None:
    """A Python of this version that can make environments: the running one, on the PATH, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [sys.executable] if version == HERE else []
    found += filter(None, [shutil.which(f"python{version}")])
    found += map(str, sorted(pyenv.glob(f"{version}.*/bin/python{version}")))
    for candidate in found:
        check = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", check], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that goes away at once: an environment with torch can weigh gigabytes."""
    with tempfile.TemporaryDirectory(prefix="openbagel-") as folder:
        yield Path(folder)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {name for name in names if name.startswith("openbagel/")}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"openbagel"}
    files = (path for path in (ROOT / "openbagel").rglob("*") if path.is_file())
    assert packed == {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.parametrize("version", sorted({*VERSIONS, HERE}))
def test_fresh_environment_draws(version: str, wheel: Path, scratch: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    if shutil.disk_usage(scratch).free < FREE_BYTES:
        pytest.skip(f"less than {FREE_BYTES / 2**30:.0f} GiB free for an environment")
    venv, out = scratch / "venv", scratch / "elsewhere"
    out.mkdir()
    run(python, "-m", "venv", venv)
    pip = (venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir")
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    run(*pip, "--no-deps", *INDEX, torch)
    run(*pip, "-c", CONSTRAINTS, wheel)
    run(venv / "bin" / "python", "-m", "pip", "check")
    run(venv / "bin" / "openbagel", "generate", "a red circle", "-o", "out.png", "--seed", "0", cwd=out)
    with Image.open(out / "out.png") as picture:
        assert picture.format == "PNG"
        picture.load()
    assert min(picture.size) >= 32
    assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1], "one flat colour"
