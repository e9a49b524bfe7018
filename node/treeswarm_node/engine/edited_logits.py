"""Apply rules to logits for as long as a token is chosen from them."""

import contextlib
from collections.abc import Iterator

import torch

from treeswarm.session.grammars import unpack_bits
from treeswarm.session.logit_edits import LogitEdits


@contextlib.contextmanager
def edited(logits: torch.Tensor, edits: LogitEdits | None) -> Iterator[torch.Tensor]:
    """Edit logits, float32 [n, vocab], in place; at the end they are the model's own again.

    Only the columns that the rules name are read and written.  A token that a grammar excludes stays at −inf, because
    to save a whole vocabulary would take longer than all else, and no such token is chosen.
    """
    if edits is None:
        yield logits
        return
    columns = torch.from_numpy(edits.tokens).to(logits.device)
    before = logits.index_select(1, columns)
    if len(edits.tokens):
        after = torch.from_numpy(edits.edited(before.cpu().numpy())).to(logits.device)
        logits.index_copy_(1, columns, after)
    if edits.masks is not None:
        allowed = torch.from_numpy(unpack_bits(edits.masks, logits.shape[1])).to(logits.device)
        logits.masked_fill_(~allowed, -torch.inf)
        before.masked_fill_(~allowed.index_select(1, columns), -torch.inf)
    try:
        yield logits
    finally:
        logits.index_copy_(1, columns, before)
