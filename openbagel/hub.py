"""Models by name: "nano", a path, or a Hugging Face id, downloaded into the usual cache.

The environment decides as for every Hugging Face tool: HF_HOME (where the cache is), HF_ENDPOINT (a mirror),
HF_TOKEN, HF_HUB_OFFLINE=1 (the cache alone). Only tensors, JSON and text are taken: no pickles, no code.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

NANO = Path(__file__).parent / "assets" / "nano"
WEIGHTS = ("*.safetensors", "*.gguf")
TAKEN = (*WEIGHTS, "*.json", "*.txt")
OUTLINED = ("*config.json", "*.index.json")
"""What an outline holds beside weight files."""
PIECE = 2**25
"""Bytes of one request. Larger files come in pieces, so that a cut download goes on where it stopped."""
HEADED = r"(\w+/)?[\w.-]+\.(safetensors|gguf)"
MOST_HEADER = 10**8
"""Bytes that safetensors reads of a header."""


def find_model(model: str | Path, *, cached: bool = False, outline: Path | None = None) -> Path:
    """The folder or file of "nano", of a path (of a training run what it wrote), or of a Hugging Face id:
    owner/name or owner/name@revision, downloaded, or looked up in the cache alone, or as an outline in a
    folder.
    """
    path = NANO if str(model) == "nano" else Path(model)
    if (path / "recipe.json").is_file():
        path = next((path / name for name in ("checkpoint", "adapter") if (path / name).is_dir()), path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", str(model)):
        return path
    return download(str(model), to=outline, cached=cached, outline=outline is not None)


@contextmanager
def outlined(model: str | Path) -> Iterator[Path]:
    """As `find_model`, but of a model on the Hub no more comes than configuration and headers, for a while:
    its tensors are holes in files of the same length.
    """
    with TemporaryDirectory(prefix="openbagel-", ignore_cleanup_errors=True) as folder:
        yield find_model(model, outline=Path(folder))


def download(
    model: str,
    *,
    to: str | Path | None = None,
    revision: str | None = None,
    workers: int = 8,
    cached: bool = False,
    outline: bool = False,
) -> Path:
    """Brings a model of the Hub here and returns its folder: `to`, or one in the cache.

    revision is a branch, tag or commit. What is here already is not fetched again; where the Hub cannot be
    asked, or is not to be (cached), the cache must do. An outline has holes for tensors. ValueError in one
    line for whatever is in the way, with its remedy.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    name, _, pinned = model.partition("@")
    revision = revision or pinned or None
    unasked = OSError("not asked") if cached or constants.HF_HUB_OFFLINE else None
    try:
        if unasked is None:
            fetch, folder = _fetch_headers if outline else _fetch_large, Path(to) if to else None
            fetch(name, *_listed(name, revision), folder, workers)
    except (HTTPError, OSError) as error:
        unasked = error
    try:
        if unasked and to and not outline:
            raise unasked
        options: dict[str, Any] = {"local_files_only": unasked is not None, "max_workers": workers}
        options |= {"local_dir": None if unasked else to, "allow_patterns": OUTLINED if outline else TAKEN}
        return Path(snapshot_download(name, revision=revision, **options))
    except (HTTPError, OSError) as error:
        raise ValueError(_told(unasked or error, name, revision)) from None


def _listed(name: str, revision: str | None) -> tuple[str | None, list[Any]]:
    """The commit, and those of its files that are taken."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = [f for f in found.siblings or [] if any(fnmatch(f.rfilename, pattern) for pattern in TAKEN)]
    if not any(fnmatch(f.rfilename, pattern) for f in files for pattern in WEIGHTS):
        raise ValueError(f"{name} holds neither safetensors nor GGUF weights; others are never fetched")
    return found.sha, files


def _fetch_headers(name: str, sha: str | None, files: list[Any], to: Path | None, workers: int) -> None:
    """Weight files as long as they are, with nothing after their headers; of GGUF files, which do not say how
    long those are, the first piece.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import http_stream_backoff

    def start(url: str, count: int) -> bytes:
        with http_stream_backoff(**_request(url, 0, count)) as answer:
            return next(answer.raise_for_status().iter_bytes(count), b"")  # no more of a file sent whole

    def fetch(f: Any) -> None:
        url, length = hf_hub_url(name, f.rfilename, revision=sha), PIECE
        if f.rfilename.endswith(".safetensors"):
            length = 8 + min(int.from_bytes(start(url, 8), "little"), MOST_HEADER)
        place = Path(to or "", f.rfilename)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(start(url, min(length, f.size)))
        os.truncate(place, f.size)

    wanted = [f for f in files if re.fullmatch(HEADED, f.rfilename)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fetch, wanted))


def _fetch_large(name: str, sha: str | None, files: list[Any], to: Path | None, workers: int) -> None:
    """Checks whether there is room, then fetches the files of several pieces. The library does the rest; it
    would begin a file that was cut anew.
    """
    from huggingface_hub import constants, hf_hub_url

    folder = to or Path(constants.HF_HUB_CACHE, "models--" + name.replace("/", "--"), "blobs")
    wanted, needed = {}, 0
    for f in files:
        place = folder / (f.rfilename if to else f.lfs.sha256 if f.lfs else f.blob_id or "")
        if not place.is_file():
            part = wanted[f.rfilename] = place.with_name(f"{place.name}.part")
            needed += (f.size or 0) - (part.stat().st_size if part.is_file() else 0)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ValueError(
            f"no space for {name} in {there}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free, "
            f"{(needed - free) / 1e9:.2f} GB missing; free them, or name another disk by HF_HOME"
        )
    for f in files:
        if f.rfilename in wanted and f.lfs and f.lfs.size > PIECE and "/" not in f.rfilename:
            _fetch(hf_hub_url(name, f.rfilename, revision=sha), wanted[f.rfilename], f.lfs, workers)


def _request(url: str, start: int, end: int) -> dict[str, Any]:
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    return {"method": "GET", "url": url, "headers": headers}


def _fetch(url: str, part: Path, lfs: Any, workers: int) -> None:
    """One large file into `part`, whose length says where to go on; whole, it loses the suffix."""
    from huggingface_hub.utils import WeakFileLock, http_backoff, http_stream_backoff

    def piece(start: int) -> bytes:
        end = min(start + PIECE, lfs.size)
        return http_backoff(**_request(url, start, end)).raise_for_status().content

    with http_stream_backoff(**_request(url, 0, 1)) as probe:
        if probe.status_code != 206:
            return  # a mirror that sends whole files only
    part.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{part}.lock"), ThreadPoolExecutor(workers) as pool:
        if part.with_suffix("").is_file():
            return  # another process was first
        with part.open("ab") as out, tqdm(desc=part.stem, total=lfs.size, unit="B", disable=None) as bar:
            bar.update(out.tell())
            for start in range(out.tell(), lfs.size, workers * PIECE):
                stop = min(start + workers * PIECE, lfs.size)  # a bounded number of pieces in memory
                for content in pool.map(piece, range(start, stop, PIECE)):
                    bar.update(out.write(content))
        with part.open("rb") as stored:
            digest = hashlib.file_digest(stored, "sha256").hexdigest()
        if digest != lfs.sha256:
            part.unlink()
            raise ValueError(f"{part.stem} arrived damaged; download it again")
        part.rename(part.with_suffix(""))
        Path(f"{part}.lock").unlink(missing_ok=True)


def _told(error: Exception, name: str, revision: str | None) -> str:
    """What a user can do about it, in one line."""
    from huggingface_hub import constants, errors

    where, first = f"{constants.ENDPOINT}/{name}", " ".join(str(error).split())[:200]
    if isinstance(error, errors.GatedRepoError):
        return f"{where} is gated: accept its terms there, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{where} has no revision {revision!r}: name a branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} is neither a folder nor a public model ({where}): correct it, or run `hf auth login`"
    remedy = f"run `openbagel download {name}`"
    if constants.HF_HUB_OFFLINE:
        remedy = f"unset HF_HUB_OFFLINE and {remedy}"
    elif first != "not asked":
        remedy = f"{where} failed ({first}): check network, token and HF_ENDPOINT"
    return f"{name} is neither a folder nor a model that is whole in the cache; {remedy}"
