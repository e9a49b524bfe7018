"""The cache directory: what can be fetched or computed again."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from treeswarm.errors import ModelError


def cache_folder(*parts: str) -> Path:
    """Return the path of a folder of this project in the cache directory, which may not exist yet.

    The cache is the user's, or that of this Python environment if `make` has given it one: then nothing outside the
    clone is written.
    """
    own = Path(sys.prefix) / "cache"
    base = os.environ.get("XDG_CACHE_HOME") or (own if own.is_dir() else Path.home() / ".cache")
    return Path(base).joinpath("treeswarm", *parts)


def fill_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return `folder`; if it does not exist yet, let `fill` write into a new folder that becomes it when complete.

    Two programs may do so at once: the first one that is ready wins.  Raises ModelError if the disk refuses.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            filled = Path(temporary) / "content"
            filled.mkdir()
            fill(filled)
            try:
                filled.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise ModelError(
            f"cannot write to the cache {folder.parent} ({error.strerror or error}): free some space there, or name "
            "another cache directory in XDG_CACHE_HOME"
        ) from None
    return folder
