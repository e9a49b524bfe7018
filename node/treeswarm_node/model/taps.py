"""Taps: the results of some blocks of a forward, kept for a speculator."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from treeswarm_node.model.families.extra_inputs import ExtraInputs
from treeswarm_node.model.families.frame import RunLayer


@dataclass(frozen=True, eq=False)
class Taps:
    """Records what some blocks return in one forward."""

    blocks: Sequence[int]
    """Indices of the tapped blocks, rising."""
    _results: dict[int, torch.Tensor] = field(default_factory=dict)

    def recording(self, run_layer: RunLayer, extra_inputs: ExtraInputs) -> RunLayer:
        """Return `run_layer` with the results of tapped blocks recorded."""

        def run(index: int, arguments: dict[str, Any]) -> Any:
            result = run_layer(index, arguments)
            if index in self.blocks:
                state = result[0] if isinstance(result, tuple | list) else result
                self._results[index] = extra_inputs.to_rows(state)
            return result

        return run

    def states(self) -> torch.Tensor:
        """Return the results side by side, [rows, blocks · hidden]; there must be a tapped block."""
        return torch.cat([self._results[block] for block in self.blocks], -1)
