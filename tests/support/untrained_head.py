"""A speculator of the demo model that was never trained."""

from pathlib import Path

import torch

from treeswarm.identity import config_digest
from treeswarm.model_files import read_config, resolve_model
from treeswarm_node.speculator.autoregressive import head_shape
from treeswarm_node.speculator.files import SpeculatorConfig, save_speculator
from treeswarm_node.speculator.head import SpeculatorHead


def save_untrained_head(folder: Path) -> None:
    """Write a head for the demo's last three blocks, always the same one."""
    digest = config_digest(read_config(resolve_model("demo")))
    config = SpeculatorConfig("autoregressive", digest, "", 256, 4096, (5, 6, 7), 4, 2, 64, 64, window=64)
    torch.manual_seed(1)
    save_speculator(folder, config, SpeculatorHead(head_shape(config)).state_dict())
