"""A span's modules in memory, as transformers made them."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from treeswarm.protocol.spans import Span
from treeswarm_node.model.offload import Offload


@dataclass(frozen=True, eq=False)
class LoadedSpan:
    """The hosted part of a model.

    `skeleton` is the transformers causal-LM whole, with a config of its own, in eval mode, no gradients.  Only what the
    span hosts holds real tensors: decoder blocks `span` (under their own indices in the skeleton's layer list), the
    input embedding if block 0 is hosted, final norm and LM head if the last block is (a tied head is a real tensor
    too).  Buffers (rotary tables, embedding scales) are real everywhere; every other parameter is on `meta`.
    """

    skeleton: PreTrainedModel
    span: Span
    dtype: torch.dtype
    device: torch.device
    offload: Offload | None = None
    """Where the blocks' weights wait; None: they are in place."""

    def place(self, block: int) -> None:
        """Before the block runs, or anybody looks at its weights."""
        if self.offload is not None:
            self.offload.place(block - self.span.start)

    @property
    def config(self) -> PretrainedConfig:
        return self.skeleton.config

    @property
    def blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def is_head(self) -> bool:
        return self.span.start == 0

    @property
    def is_tail(self) -> bool:
        return self.span.end == self.blocks
