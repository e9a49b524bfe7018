"""Count what a node has computed."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts work since the node was started, for clients, the panel and the metrics endpoint."""

    frames: int = 0
    """Number of steps computed."""
    forwards: int = 0
    """Number of forwards run."""
    forward_sessions: int = 0
    """Number of sessions in each forward, summed over all forwards."""
    skipped_rows: int = 0
    """Number of rows that died while they waited, and were not computed."""
    rows: int = 0
    """Number of rows computed."""
    tokens: int = 0
    """Number of tokens whose rows stay in the trunk: those of prompts, and those committed of trees."""
    compute_s: float = 0.0
    """Seconds that the device spent in forwards."""
    waited_s: float = 0.0
    """Seconds that all appends together waited before their forwards."""
    queue_s: float = 0.0
    """Seconds that an append waits before its forward: a moving average over the last dozens of appends."""
    proposals: int = 0
    """Number of trees that the speculator proposed."""
    proposed_right: int = 0
    """Number of tokens of later walks that the last proposal before them had named."""
