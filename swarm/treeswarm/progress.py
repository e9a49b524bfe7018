"""Progress of long work: one small callback, and a progress bar class that reports the hub's downloads through it."""

from collections.abc import Callable
from typing import Any

DOWNLOADING = "downloading"
"""Name of an activity counted in bytes."""
LOADING = "loading tensors"
"""Name of an activity counted in tensors."""
CHECKING = "checking weights"
"""Name of an activity counted in bytes."""
CONVERTING = "reading config and tokenizer for the first time"
"""Name of an activity without an amount, which is reported as 0 of 0 when it begins."""
PROVING = "testing and measuring the loaded blocks"
"""Name of an activity without an amount: it is reported as 0 of 0 when it begins and 1 of 1 when it has ended."""
# The hub's client has one bar for received bytes and one for written bytes.  The bar with this description is ignored.
ARRIVING = "Downloading bytes"

Progress = Callable[[int, int, str], None]
"""Callback with the amount done, the total amount (0 if it is not known yet), and the activity, one of the names above.

It may be called from any thread.
"""


def progress_bar_class(progress: Progress) -> Any:
    """Return a class of progress bars for `snapshot_download` that display nothing and report bytes to `progress`."""
    from huggingface_hub.utils import tqdm  # noqa: PLC0415  # Only needed for hub ids.

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._bytes = kwargs.get("unit") == "B" and kwargs.get("desc") != ARRIVING
            self._done = int(kwargs.get("initial") or 0)
            kwargs.pop("name", None)  # An argument of the hub client's own bars.
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._bytes:
                progress(self._done, int(self.total or 0), DOWNLOADING)
            return None

    return ReportingBar
