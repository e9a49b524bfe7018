"""The files of a speculator: a JSON config, and weights as safetensors.  Nothing is pickled or executed."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from treeswarm.errors import ModelError
from treeswarm_node.speculator.packing import SCALES, packed, unpacked

CONFIG, WEIGHTS = "speculator.json", "speculator.safetensors"
FORMAT_VERSION = 1
AUTOREGRESSIVE = "autoregressive"
PARALLEL = "parallel"
KINDS = (AUTOREGRESSIVE, PARALLEL)
"""Kinds that nodes serve."""
# Sizes above these are mistakes: they are refused before any memory is taken for them.
MOST_TAPS, LARGEST_SIZE = 16, 1 << 20


@dataclass(frozen=True)
class SpeculatorConfig:
    """What the JSON file says."""

    kind: str
    """Kind of the speculator, one of KINDS."""
    config_digest: str
    """Digest of the target's config.  A speculator of another config is refused."""
    weights_digest: str
    """Digest of the target's weights.  With others it guesses worse, and the text stays exact."""
    hidden_size: int
    vocab_size: int
    """Number of token ids of the target."""
    taps: tuple[int, ...]
    """Indices of the target's blocks whose results are its input, rising."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int
    """Number of rows, itself included, that a row attends to."""
    greedy_tau: float = 0.5
    """Temperature of the scores that fits how often a greedy target follows them."""
    sampled_tau: float = 0.8
    """The same for a target that samples with noise that the speculator knows."""
    agreement: tuple[float, ...] = ()
    """Share of held-out tokens that the speculator's first guess names, by level below the root."""

    @property
    def first_agreement(self) -> float:
        """Share of held-out tokens that the first guess names, or 0 if that is not known."""
        return self.agreement[0] if self.agreement else 0.0

    def check(self, kinds: tuple[str, ...] = KINDS) -> None:
        """Raise ModelError for values that no speculator of these kinds can have."""
        sizes = (self.hidden_size, self.vocab_size, self.heads, self.kv_heads, self.head_dim, self.intermediate_size)
        valid = all(isinstance(size, int) and 0 < size <= LARGEST_SIZE for size in (*sizes, self.window))
        valid &= 0 < len(self.taps) <= MOST_TAPS and list(self.taps) == sorted(set(self.taps)) and self.taps[0] >= 0
        valid &= valid and self.heads % self.kv_heads == 0 and self.head_dim % 2 == 0
        valid &= 0.01 <= self.greedy_tau <= 10 and 0.01 <= self.sampled_tau <= 10
        if not valid:
            raise ModelError(f"{CONFIG} describes no speculator that can be built: train it again")
        if self.kind not in kinds:
            raise ModelError(f"speculators of kind '{self.kind}' are not known here: known are {', '.join(kinds)}")


def save_speculator(folder: Path, config: SpeculatorConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write both files, matrices in eight bits.

    The weights are written first, so that a config never describes weights that are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS}.part"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in packed(tensors).items()}, partial)
    partial.replace(folder / WEIGHTS)
    content = {"format": "treeswarm speculator", "version": FORMAT_VERSION, **asdict(config)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def read_speculator_config(folder: Path, kinds: tuple[str, ...] = KINDS) -> SpeculatorConfig:
    """Read the config of a speculator of one of these kinds.  Raises ModelError."""
    try:
        content: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
        if content.get("version") != FORMAT_VERSION:
            raise ModelError(
                f"'{folder / CONFIG}' has version {content.get('version')}, this release reads version {FORMAT_VERSION}"
            )
        known = {field.name: content[field.name] for field in fields(SpeculatorConfig) if field.name in content}
        config = SpeculatorConfig(**known | {name: tuple(known.get(name, ())) for name in ("taps", "agreement")})
        config.check(kinds)
    except FileNotFoundError:
        raise ModelError(
            f"there is no speculator in '{folder}', as {CONFIG} is missing: give a folder that "
            "`swarm train-speculator` wrote, or none"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"'{folder / CONFIG}' cannot be read: {error}") from None
    return config


def read_speculator_weights(folder: Path, only: str | None = None) -> dict[str, torch.Tensor]:
    """Read the weights of a speculator, or one of them, if it is there.  Raises ModelError."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [name for name in file.keys() if only in (None, name, name.removesuffix(SCALES))]  # noqa: SIM118
            return unpacked({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"'{folder / WEIGHTS}' cannot be read: {error}") from None
