"""Families of models that share a vocabulary, and the small model that drafts for each.  Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treeswarm.model_files import ModelShape
from treeswarm_client.drafters.selection.vocabulary import Vocabulary

# A draft must have at most this share of the target's work per token, or drafting takes as long as generating.
LARGEST_SHARE = 0.5
# Embeddings are padded to multiples of 64 to 1024 rows, and programs that add tokens to a model add some of their own.
LARGEST_PADDING = 1025


@dataclass(frozen=True)
class DraftFamily:
    """One family: how its tokenizer is recognised, and which model drafts for it."""

    name: str
    """Name of the family, as users know it."""
    draft: str | None
    """Hub id of the smallest published model with this tokenizer, or None if none is small."""
    gigabytes: float
    """Size of that model's files."""
    blocks: int
    """Number of the draft's blocks."""
    hidden_size: int
    """Number of values in one row of the draft's activations."""
    vocab_sizes: tuple[int, ...]
    """Numbers of rows that the embeddings of the family's models have; some are padded."""
    marks: Mapping[int, str]
    """Special tokens by id that no other family has at these places."""

    def has_tokenizer_of(self, vocabulary: Vocabulary) -> bool:
        """Return whether a vocabulary has this family's special tokens."""
        return all(vocabulary.token(token_id) == token for token_id, token in self.marks.items())

    def is_smaller_than(self, shape: ModelShape) -> bool:
        """Return whether this family's draft is small enough to draft for a model of that shape."""
        work = self.blocks * self.hidden_size**2
        return work <= LARGEST_SHARE * shape.blocks * shape.hidden_size**2


# Models with fewer marks come after those that have the same and more.  The draft's own tokenizer is compared with the
# target's, token by token, before its weights are fetched: a line here only says what is worth comparing.
FAMILIES = (
    DraftFamily("Llama 3", "meta-llama/Llama-3.2-1B-Instruct", 2.5, 16, 2048, (128256,),
                {128000: "<|begin_of_text|>", 128009: "<|eot_id|>"}),
    DraftFamily("Qwen 3", "Qwen/Qwen3-0.6B", 1.5, 28, 1024, (151936,),
                {151644: "<|im_start|>", 151657: "<tool_call>", 151667: "<think>"}),
    DraftFamily("Qwen 2.5", "Qwen/Qwen2.5-0.5B-Instruct", 1.0, 24, 896, (151936, 152064),
                {151644: "<|im_start|>", 151657: "<tool_call>"}),
    DraftFamily("Gemma 3", "google/gemma-3-270m-it", 0.6, 18, 640, (262144, 262208, 262400),
                {2: "<bos>", 105: "<start_of_turn>", 106: "<end_of_turn>"}),
    DraftFamily("Mistral", "alamios/Mistral-Small-3.1-DRAFT-0.5B", 1.0, 24, 896, (131072,),
                {1: "<s>", 3: "[INST]", 4: "[/INST]"}),
    DraftFamily("SmolLM2", "HuggingFaceTB/SmolLM2-135M-Instruct", 0.3, 30, 576, (49152,),
                {0: "<|endoftext|>", 1: "<|im_start|>", 15: "<jupyter_script>"}),
    # Its smallest published model, gpt-oss-20b, takes 41 GB where MXFP4 must be expanded; its heads are for the tail.
    DraftFamily("gpt-oss", None, 0.0, 0, 0, (201088,), {200005: "<|channel|>", 200006: "<|start|>"}),
)  # fmt: skip


def is_padding(rows: int, others: Sequence[int]) -> bool:
    """Return whether embeddings with so many rows may be those of other sizes, padded or cut at their end."""
    return any(abs(rows - other) < LARGEST_PADDING for other in others)


def padded_family_of(shape: ModelShape, vocabulary: Vocabulary) -> DraftFamily | None:
    """Return the family whose tokenizer a model has, if its embeddings are the family's but for padding, or None."""
    for family in FAMILIES:
        if is_padding(shape.vocab_size, family.vocab_sizes) and family.has_tokenizer_of(vocabulary):
            return family
    return None


def has_a_family(shape: ModelShape) -> bool:
    """Return whether any family has such an embedding: otherwise no tokenizer need be read."""
    return any(is_padding(shape.vocab_size, family.vocab_sizes) for family in FAMILIES)


def family_of(shape: ModelShape, vocabulary: Vocabulary) -> DraftFamily | None:
    """Return the family of a model by its config and its tokenizer, or None if it is of none of them."""
    for family in FAMILIES:
        if shape.vocab_size in family.vocab_sizes and family.has_tokenizer_of(vocabulary):
            return family
    return None
