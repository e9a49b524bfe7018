"""Train the bundled pair: `demo`, a small Llama for Python code, and `demo-draft`, which is distilled from it.

    python deploy/demo_models/recipe.py tokenizer target draft practice report --out swarm/treeswarm/models

It needs torch, transformers and tokenizers; the corpus is the Python installation that runs it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import VOCAB_SIZE, encode, read_corpus, train_tokenizer
from report import print_report
from training import distilling, in_turn, train, windows, written_by

SEED = 7
CONTEXT = 2048
TARGET, DRAFT = "demo", "demo-draft"


def target_config(end_of_text: int) -> LlamaConfig:
    """Return 6.2 M parameters in 8 layers: small enough for two CPU cores, deep enough for three spans."""
    return _config(end_of_text, hidden=256, intermediate=576, layers=8, heads=4, kv_heads=2)


def draft_config(end_of_text: int) -> LlamaConfig:
    """Return about 0.95 M parameters in 2 layers, half of them in the embedding."""
    return _config(end_of_text, hidden=128, intermediate=384, layers=2, heads=4, kv_heads=4)


def _config(end_of_text: int, *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def make_tokenizer(out: Path) -> None:
    """Train the tokenizer, and save it for both models."""
    tokenizer = train_tokenizer(read_corpus())
    tokenizer.model_max_length = CONTEXT
    for name in (TARGET, DRAFT):
        tokenizer.save_pretrained(out / name)


def make_target(out: Path, minutes: float) -> None:
    """Train the target on the corpus."""
    tokenizer = _tokenizer(out)
    model = LlamaForCausalLM(target_config(tokenizer.eos_token_id))
    print(f"target: {model.num_parameters() / 1e6:.2f} M parameters")

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    train(model, windows(_train_tokens(tokenizer), SEED), loss_of, minutes, out / TARGET)


def make_draft(out: Path, minutes: float) -> None:
    """Distil the target: the draft learns its whole distribution at every position of the corpus."""
    tokenizer = _tokenizer(out)
    target = LlamaForCausalLM.from_pretrained(out / TARGET, dtype=torch.float32).eval()
    model = LlamaForCausalLM(draft_config(tokenizer.eos_token_id))
    print(f"draft: {model.num_parameters() / 1e6:.2f} M parameters")
    train(model, windows(_train_tokens(tokenizer), SEED + 1), distilling(model, target), minutes, out / DRAFT)


def continue_draft(out: Path, minutes: float, seed: int) -> None:
    """Continue to distil, half of the time on texts that the target generates: those are what a draft is used on."""
    tokenizer = _tokenizer(out)
    target, model = (LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32) for name in (TARGET, DRAFT))
    tokens = _train_tokens(tokenizer)
    mixed = in_turn(windows(tokens, seed + 2), written_by(target.eval(), tokens, seed + 3))
    train(model, mixed, distilling(model, target), minutes, out / DRAFT, rate=0.5)


def _tokenizer(out: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(out / TARGET)


def _train_tokens(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    tokens = encode(tokenizer, read_corpus().train)
    print(f"corpus: {len(tokens) / 1e6:.2f} M training tokens", flush=True)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=["tokenizer", "target", "draft", "practice", "report"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model directories to")
    parser.add_argument("--minutes", type=float, default=100, help="wall-clock minutes for the target")
    parser.add_argument("--draft-minutes", type=float, default=25, help="wall-clock minutes for the draft")
    parser.add_argument(
        "--practice-minutes", type=float, default=110, help="wall-clock minutes for the draft's practice"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="random seed; give another one to continue practice")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    steps = {
        "tokenizer": lambda: make_tokenizer(args.out),
        "target": lambda: make_target(args.out, args.minutes),
        "draft": lambda: make_draft(args.out, args.draft_minutes),
        "practice": lambda: continue_draft(args.out, args.practice_minutes, args.seed),
        "report": lambda: print_report(args.out / TARGET, args.out / DRAFT),
    }
    for step in args.steps:
        steps[step]()


if __name__ == "__main__":
    main()
