"""Published EAGLE-3 heads for well-known models.  A line only says what is worth looking for; loading checks it."""

from dataclasses import dataclass

from treeswarm.model_files import ModelShape


@dataclass(frozen=True)
class KnownHead:
    """One published head, and the shape of the model that it guesses for."""

    hub_id: str
    gigabytes: float
    """Size of its files."""
    model_type: str
    blocks: int
    hidden_size: int

    def fits(self, shape: ModelShape) -> bool:
        """Return whether a model has the shape of the one that the head was made for."""
        return (self.model_type, self.blocks, self.hidden_size) == (shape.model_type, shape.blocks, shape.hidden_size)


KNOWN_HEADS = (
    KnownHead("RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3", 1.9, "llama", 32, 4096),
    KnownHead("RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3", 4.9, "llama", 80, 8192),
    KnownHead("RedHatAI/Qwen3-8B-speculator.eagle3", 2.0, "qwen3", 36, 4096),
    KnownHead("RedHatAI/Qwen3-14B-speculator.eagle3", 2.8, "qwen3", 40, 5120),
    KnownHead("RedHatAI/Qwen3-32B-speculator.eagle3", 3.1, "qwen3", 64, 5120),
    KnownHead("RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.eagle3", 1.0, "qwen3_moe", 48, 2048),
    KnownHead("RedHatAI/Qwen3-235B-A22B-Instruct-2507-speculator.eagle3", 2.4, "qwen3_moe", 94, 4096),
    KnownHead("RedHatAI/Qwen3-235B-A22B-speculator.eagle3", 2.4, "qwen3_moe", 94, 4096),
    KnownHead("RedHatAI/gpt-oss-20b-speculator.eagle3", 1.7, "gpt_oss", 24, 2880),
    KnownHead("RedHatAI/gpt-oss-120b-speculator.eagle3", 1.8, "gpt_oss", 36, 2880),
)


def known_heads(shape: ModelShape) -> tuple[KnownHead, ...]:
    """Return the heads for models of a shape."""
    return tuple(head for head in KNOWN_HEADS if head.fits(shape))
