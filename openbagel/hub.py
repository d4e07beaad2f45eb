"""Models by name: "nano", a path, or a Hugging Face id, downloaded into the usual cache.

The environment decides as for every Hugging Face tool: HF_HOME (where the cache is), HF_ENDPOINT (a mirror),
HF_TOKEN, HF_HUB_OFFLINE=1 (the cache alone). Only tensors, JSON and text are taken: no pickles, no code.
"""

import hashlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

NANO = Path(__file__).parent / "assets" / "nano"
WEIGHTS = ("*.safetensors", "*.gguf")
TAKEN = (*WEIGHTS, "*.json", "*.txt")
PIECE = 2**25
"""Bytes of one request. Larger files come in pieces, so that a cut download goes on where it stopped."""


def find_model(model: str | Path, *, cached: bool = False) -> Path:
    """The folder or file of "nano", of a path, or of a Hugging Face id: owner/name or owner/name@revision,
    downloaded, or looked up in the cache alone.
    """
    path = NANO if str(model) == "nano" else Path(model)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", str(model)):
        return path
    return download(str(model), cached=cached)


def download(
    model: str,
    *,
    to: str | Path | None = None,
    revision: str | None = None,
    workers: int = 8,
    cached: bool = False,
) -> Path:
    """Brings a model of the Hub here and returns its folder: `to`, or one in the cache.

    revision is a branch, tag or commit. What is here already is not fetched again; where the Hub cannot be
    asked, or is not to be (cached), the cache must do. ValueError in one line for whatever is in the way,
    with its remedy.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    name, _, pinned = model.partition("@")
    revision = revision or pinned or None
    unasked = OSError("not asked") if cached or constants.HF_HUB_OFFLINE else None
    try:
        if unasked is None:
            _fetch_large(name, Path(to) if to else None, revision, workers)
    except (HTTPError, OSError) as error:
        unasked = error
    try:
        if unasked and to:
            raise unasked
        options: dict[str, Any] = {"local_dir": to, "max_workers": workers, "allow_patterns": [*TAKEN]}
        found = snapshot_download(name, revision=revision, local_files_only=unasked is not None, **options)
        return Path(found)
    except (HTTPError, OSError) as error:
        raise ValueError(_told(unasked or error, name, revision)) from None


def _fetch_large(name: str, to: Path | None, revision: str | None, workers: int) -> None:
    """Checks what there is and whether it has room, then fetches the files of several pieces. The library
    does the rest; it would begin a file that was cut anew.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url

    found = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = [f for f in found.siblings or [] if any(fnmatch(f.rfilename, pattern) for pattern in TAKEN)]
    if not any(fnmatch(f.rfilename, pattern) for f in files for pattern in WEIGHTS):
        raise ValueError(f"{name} holds neither safetensors nor GGUF weights; others are never fetched")
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
            _fetch(hf_hub_url(name, f.rfilename, revision=found.sha), wanted[f.rfilename], f.lfs, workers)


def _fetch(url: str, part: Path, lfs: Any, workers: int) -> None:
    """One large file into `part`, whose length says where to go on; whole, it loses the suffix."""
    from huggingface_hub.utils import WeakFileLock, build_hf_headers, http_backoff, http_stream_backoff

    def request(start: int, end: int) -> dict[str, Any]:
        span = {"Range": f"bytes={start}-{min(end, lfs.size) - 1}"}
        return {"method": "GET", "url": url, "headers": build_hf_headers() | span}

    def piece(start: int) -> bytes:
        return http_backoff(**request(start, start + PIECE)).raise_for_status().content

    with http_stream_backoff(**request(0, 1)) as probe:
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
