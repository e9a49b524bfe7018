"""How far long work is: one small callback, and the hub's downloads told through it."""

from collections.abc import Callable
from typing import Any

DOWNLOADING = "downloading"
"""Bytes."""
LOADING = "loading tensors"
"""Tensors."""
CHECKING = "checking weights"
"""Bytes."""
# The hub's client has bars for what arrives and for what is written: this one of them is not told.
ARRIVING = "Downloading bytes"

Progress = Callable[[int, int, str], None]
"""Called with how much is done, how much there is in all (0: not known yet), and what is being done: one of the above.
From any thread."""


def progress_bar_class(progress: Progress) -> Any:
    """A class of progress bars that `snapshot_download` takes; it shows nothing and tells `progress` the bytes."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415  # only for hub ids

    class TellingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B" and kwargs.get("desc") != ARRIVING
            self._done = int(kwargs.get("initial") or 0)
            kwargs.pop("name", None)  # of the hub client's own bars
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._bytes:
                progress(self._done, int(self.total or 0), DOWNLOADING)
            return None

    return TellingBar
