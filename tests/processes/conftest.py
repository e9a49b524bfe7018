"""Fixtures: real `swarm-node` processes, and a random model that is not in the repository."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three_nodes() -> AsyncIterator[LocalSwarm]:
    """Run the bundled target on three nodes, shared by a module's tests."""
    async with local_swarm("demo", even_cuts(8, 3)) as swarm:
        yield swarm


def save_tokenizer(folder: Path) -> int:
    """Save a small tokenizer of its own, and return its number of tokens; token 0 ends a text."""
    corpus = [f"the {i} quick brown foxes jump over {i * 7} lazy dogs\n" for i in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_random_model(folder: Path, *, layers: int, seed: int, **changes: object) -> Path:
    """Save a random Llama with another vocabulary, GQA ratio and depth, and its own tokenizer; return its folder."""
    vocab_size = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=0,
        **changes,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with five layers, which three nodes cannot share evenly."""
    return save_random_model(tmp_path_factory.mktemp("random"), layers=5, seed=1)


@pytest.fixture(scope="session")
def random_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("random-draft"), layers=1, seed=2)
