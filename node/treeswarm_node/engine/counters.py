"""What a node has computed."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Since start, for whoever asks the node."""

    frames: int = 0
    forwards: int = 0
    forward_sessions: int = 0
    skipped_rows: int = 0
    """Rows that died while they waited, and were not computed."""
    rows: int = 0
    """Computed."""
    tokens: int = 0
    """Of texts, whose rows stay: prompts, and what was committed of trees."""
    compute_s: float = 0.0
    """The device's time in forwards."""
    waited_s: float = 0.0
    """What all appends together waited before their forwards."""
    queue_s: float = 0.0
    """What an append waits before its forward, smoothed over the last dozens."""
