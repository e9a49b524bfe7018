"""The kinds of speculators that can be trained: how each is made, learns and is loaded."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from treeswarm_bench.speculators.kinds.block_heads import LATTICE, BlockHeads, LatticeSpeculator
from treeswarm_bench.speculators.kinds.block_learning import BlockLearner, LatticeLearner
from treeswarm_bench.speculators.kinds.token_mlp import MLP, MlpSpeculator, TokenMlp
from treeswarm_bench.speculators.learning import HeadLearner
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator, head_shape
from treeswarm_node.speculator.files import AUTOREGRESSIVE, PARALLEL, SpeculatorConfig
from treeswarm_node.speculator.head import SpeculatorHead
from treeswarm_node.speculator.parallel.speculator import ParallelHead, ParallelSpeculator
from treeswarm_node.speculator.seam import Speculator


@dataclass(frozen=True)
class TrainedKind:
    """One kind."""

    make: Callable[[SpeculatorConfig], torch.nn.Module]
    """Returns a head of a config's sizes, with random weights."""
    learner: type[HeadLearner]
    load: Callable[..., Speculator]
    """Loads a folder; see `AutoregressiveSpeculator.load`."""


TRAINED_KINDS: Mapping[str, TrainedKind] = {
    AUTOREGRESSIVE: TrainedKind(
        lambda config: SpeculatorHead(head_shape(config)), HeadLearner, AutoregressiveSpeculator.load
    ),
    MLP: TrainedKind(TokenMlp.of, HeadLearner, MlpSpeculator.load),
    LATTICE: TrainedKind(BlockHeads.of, LatticeLearner, LatticeSpeculator.load),
    PARALLEL: TrainedKind(ParallelHead.of, BlockLearner, ParallelSpeculator.load),
}


def unrefined(speculator: Speculator) -> Speculator | None:
    """Return the speculator as it is without refining its lattice, or None if it makes none."""
    if not isinstance(speculator, LatticeSpeculator | ParallelSpeculator):
        return None
    plain = copy.copy(speculator)
    plain.is_refined = False
    return plain
