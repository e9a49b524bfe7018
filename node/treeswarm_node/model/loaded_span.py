"""Hold a span's modules as transformers builds them, and describe the span to clients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.spans import Span
from treeswarm_node.model.checkpoint.parts import LoadedPart
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.offload import Offload


@dataclass(frozen=True, eq=False)
class CheckpointWeights:
    """Opens the tensors from which a span's modules were loaded, so that they can be read once more."""

    open: Callable[[], dict[str, Any]]
    """Returns lazy tensors by name in the checkpoint; each is read when it is indexed."""
    targets: Mapping[str, str]
    """Name in the model by name in the checkpoint; several tensors may be merged into one of the model."""
    parts: Sequence[LoadedPart] = ()
    """Parts in which the tensors were loaded."""


@dataclass(frozen=True, eq=False)
class LoadedSpan:
    """Holds the hosted part of a model.

    `skeleton` is the whole causal LM of transformers, with a config of its own, in eval mode and without gradients.
    Only hosted parts hold real tensors: the decoder blocks `span`, the input embedding if block 0 is hosted, final norm
    and LM head if the last block is.  Blocks keep their indices in the skeleton's layer list.  A tied head is a real
    tensor too.  Buffers (rotary tables, embedding scales) are real everywhere; every other parameter is on `meta`.
    """

    skeleton: PreTrainedModel
    span: Span
    """Hosted decoder blocks."""
    dtype: torch.dtype
    """Dtype in which the blocks compute."""
    device: torch.device
    """Device on which the blocks compute."""
    offload: Offload | None = None
    """Offloaded weights of the blocks, or None if the weights are in the modules."""
    weights: CheckpointWeights | None = None
    """The checkpoint's tensors, or None if the modules were not loaded from a checkpoint."""
    holds_codes: bool = False
    """Whether weights are held in the bits in which they were published, as far as that is possible."""

    def load_block(self, block: int) -> None:
        """Make a block's weights available; must be called before the block runs and before its weights are read."""
        if self.offload is not None:
            self.offload.load_block(block - self.span.start)

    @property
    def config(self) -> PretrainedConfig:
        """The config of the text decoder, which is that of the model unless it is a multimodal wrapper."""
        config: PretrainedConfig = self.skeleton.config.get_text_config(decoder=True)
        return config

    @property
    def model_type(self) -> str:
        """Type of the model, as its config names it: of a multimodal wrapper the wrapper's own."""
        return str(self.skeleton.config.model_type)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks of the whole model."""
        return len(find_blocks(self.skeleton).layers)

    @property
    def is_tail(self) -> bool:
        """Whether the span ends with the model's last block."""
        return self.span.end == self.blocks


@dataclass(frozen=True)
class ServedSpan:
    """Describes to clients what a node hosts."""

    span: Span
    """Decoder blocks that this node hosts."""
    blocks: int
    """Number of decoder blocks of the whole model."""
    vocab_size: int
    """Number of token ids of the model."""
    hidden_size: int
    """Number of values in one row of activations."""
    max_positions: int
    """Number of tokens in the model's context."""
    config: str
    """Digest of the model's config, which names the model in records."""
    numerics: NumericsClass
    """Numerics class that this node computes in."""
    attention: str
    """Name of the attention adapter: `torch-sdpa`, `torch-reference` or `torch-flash`."""
    activation_bytes: int
    """Number of bytes of one row on a link."""
