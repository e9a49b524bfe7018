"""GGUF files of the hub, `org/repo:file.gguf`: only their beginning and the tensors that are needed are downloaded.

The copy in the cache is a sparse file of the whole size; what was not downloaded takes no room on the disk.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError
from treeswarm.extras import require
from treeswarm.model_sources.cache import cache_folder, fill_once
from treeswarm.model_sources.conversion import convert
from treeswarm.model_sources.gguf_files import BLOCK, VERSION, WEIGHTS, read_table
from treeswarm.model_sources.hub_errors import explain_hub_error
from treeswarm.progress import CONVERTING, DOWNLOADING, Progress
from treeswarm.protocol.spans import Span

NAME = re.compile(r"([\w.-]+/[\w.-]+):([^:]+\.gguf)", re.IGNORECASE)
SOURCE = "gguf-source.json"
"""File of a model directory that says where on the hub its GGUF file is."""
PARTS = "gguf-parts.json"
"""File of a model directory with the ranges of bytes that are on the disk."""
# A vocabulary of 152,000 tokens with its merges takes 6 MB; if this is not enough, the next try is four times as much.
BEGINNING = 16 << 20
CHUNK = 16 << 20
# Tensors this close are downloaded in one piece: a request takes longer than these bytes.
GAP = 1 << 20

Range = tuple[int, int]


@dataclass(frozen=True)
class HubFile:
    """One file of the hub at one commit."""

    url: str
    size: int
    """Number of bytes."""
    sha256: str


def is_hub_gguf(name: str) -> bool:
    """Return whether a model's name is that of a GGUF file on the hub."""
    return NAME.fullmatch(name) is not None and not Path(name).exists()


def hub_gguf_folder(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return the model directory of a GGUF file of the hub; the first time, the file's beginning is downloaded.

    Raises ModelError, BadRequest.
    """
    known = cache_folder("gguf-hub", hashlib.sha256(f"{name}\n{revision}".encode()).hexdigest()[:24])
    try:
        file = _find(name, revision, token, offline=offline)
    except ModelError:
        if not known.exists():
            raise
        return Path(known.read_text("utf-8"))
    folder = cache_folder("gguf", f"{Path(name).stem}-{file.sha256[:12]}-{VERSION}")
    if not folder.is_dir():
        require("gguf", f"the GGUF file '{name}'")
    fill_once(folder, lambda target: _fill(name, file, token, target, progress))
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(str(folder), "utf-8")
    return folder


def is_hub_folder(folder: Path) -> bool:
    """Return whether a model directory's GGUF file is a partial copy of one on the hub."""
    return (folder / SOURCE).exists()


def file_digest(folder: Path) -> str:
    """Return the hub's SHA-256 of the whole file."""
    return _source(folder).sha256


def fetch_tensors(
    folder: Path, span: Span | None, *, token: str | bool | None = None, progress: Progress | None = None
) -> None:
    """Download the tensors of the blocks in `span` (None: all blocks) and of no block.  Raises ModelError."""
    needed = []
    for name, tensor in read_table(folder).items():
        block = BLOCK.match(name)
        if span is None or block is None or span.start <= int(block[1]) < span.end:
            needed.append((tensor.offset, tensor.offset + tensor.size))
    missing = list(_missing(join_ranges(needed), _parts(folder)))
    total, done = sum(end - start for start, end in missing), 0
    file = _source(folder)
    for start, end in _pieces(missing):
        _download(file, (start, end), token, folder / WEIGHTS)
        _add_part(folder, (start, end))
        done += end - start
        if progress is not None:
            progress(done, total, DOWNLOADING)


def join_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Return the ranges in order, those that overlap or lie closer than `GAP` joined.  Pure."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1] + GAP:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def _missing(needed: Iterable[Range], present: list[Range]) -> Iterator[Range]:
    """Yield the parts of `needed` that are in none of the ranges in `present`."""
    for first, end in needed:
        start = first
        for have_start, have_end in sorted(present):
            if have_end <= start or have_start >= end:
                continue
            if have_start > start:
                yield start, have_start
            start = max(start, have_end)
        if start < end:
            yield start, end


def _pieces(ranges: Iterable[Range]) -> Iterator[Range]:
    for start, end in ranges:
        for piece in range(start, end, CHUNK):
            yield piece, min(piece + CHUNK, end)


def _find(name: str, revision: str | None, token: str | bool | None, *, offline: bool) -> HubFile:
    """Ask the hub for the file's size, digest and commit.  Raises ModelError."""
    match = NAME.fullmatch(name)
    assert match is not None
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url  # noqa: PLC0415  # Only for hub ids.
    except ImportError:
        raise ModelError(f"'{name}' is on the hub, which needs huggingface_hub: pip install huggingface_hub") from None
    if offline or constants.HF_HUB_OFFLINE:
        raise ModelError(f"'{name}' is not in the cache, and asking the hub is switched off: fetch it while online")
    try:
        url = hf_hub_url(match[1], match[2], revision=revision)
        found = get_hf_file_metadata(url, token=token)
        at_commit = hf_hub_url(match[1], match[2], revision=found.commit_hash)
    except Exception as error:  # The hub's client raises errors of requests, of httpx and its own.
        raise ModelError(explain_hub_error(error, match[1], file=match[2], revision=revision)) from error
    if not found.size or not found.etag or not re.fullmatch(r"[0-9a-f]{64}", found.etag):
        raise ModelError(f"the hub gives no size and SHA-256 of '{name}': download it, and give its path")
    return HubFile(at_commit, found.size, found.etag)


def _fill(name: str, file: HubFile, token: str | bool | None, target: Path, progress: Progress | None) -> None:
    """Download the beginning of the file, as much as its metadata take, and make the small files from it."""
    weights = target / WEIGHTS
    with weights.open("wb") as sparse:
        sparse.truncate(file.size)
    (target / SOURCE).write_text(json.dumps(asdict(file)), "utf-8")
    have, wanted = 0, min(BEGINNING, file.size)
    while True:
        for piece in _pieces([(have, wanted)]):
            if progress is not None:
                progress(piece[0], wanted, DOWNLOADING)
            _download(file, piece, token, weights)
        have = wanted
        if progress is not None:
            progress(0, 0, CONVERTING)
        try:
            convert("gguf", weights, target)
            if min((tensor.offset for tensor in read_table(target).values()), default=0) <= have:
                break
        except ModelError as error:
            if have == file.size or "no whole GGUF file" not in str(error):
                raise ModelError(str(error).replace(str(weights), name)) from None
        wanted = min(4 * have, file.size)
        if wanted == have:
            break
    (target / PARTS).write_text(json.dumps([[0, have]]), "utf-8")


def _download(file: HubFile, piece: Range, token: str | bool | None, target: Path) -> None:
    """Write one range of the file to its place in `target`.  Raises ModelError."""
    from huggingface_hub.utils import build_hf_headers, http_backoff  # noqa: PLC0415

    headers = {**build_hf_headers(token=token), "Range": f"bytes={piece[0]}-{piece[1] - 1}"}
    try:
        response: Any = http_backoff("GET", file.url, headers=headers)
        content = bytes(response.content)
    except Exception as error:  # The hub's client raises errors of requests, of httpx and its own.
        raise ModelError(f"cannot download {file.url} ({type(error).__name__}): check the network") from error
    if response.status_code != 206 or len(content) != piece[1] - piece[0]:
        raise ModelError(
            f"{file.url} answers {response.status_code} with {len(content)} bytes to a request for "
            f"{piece[1] - piece[0]}: download the file, and give its path"
        )
    with target.open("r+b") as sparse:
        sparse.seek(piece[0])
        sparse.write(content)


def _source(folder: Path) -> HubFile:
    return HubFile(**json.loads((folder / SOURCE).read_text("utf-8")))


def _parts(folder: Path) -> list[Range]:
    return [(start, end) for start, end in json.loads((folder / PARTS).read_text("utf-8"))]


def _add_part(folder: Path, piece: Range) -> None:
    """Note a range that is on the disk.  If another node does so at the same moment, one is downloaded once more."""
    written = folder / f"{PARTS}.new"
    written.write_text(json.dumps(sorted([*_parts(folder), piece])), "utf-8")
    written.replace(folder / PARTS)
