"""Measure the pair: held-out loss, the draft's greedy agreement, repetition in samples."""

import statistics
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from corpus import encode, read_corpus
from treeswarm_bench.benchmarks.texts import repeated_4grams

WINDOW = 256
WINDOWS = 64
SAMPLES, SAMPLE_TOKENS, PROMPT_TOKENS = 16, 128, 64


@torch.no_grad()
def print_report(target_folder: Path, draft_folder: Path) -> None:
    """Print all figures, measured on held-out files."""
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    target = LlamaForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(draft_folder, dtype=torch.float32).eval()
    tokens = torch.from_numpy(encode(tokenizer, read_corpus().held_out))
    windows = tokens[: len(tokens) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    windows = windows[torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).long()]
    target_logits, draft_logits = (model(input_ids=windows[:, :-1]).logits for model in (target, draft))
    labels = windows[:, 1:].flatten()
    for name, logits in (("target", target_logits), ("draft", draft_logits)):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        print(f"{name}: held-out loss {loss:.3f} nats per token")
    agreement = (target_logits.argmax(-1) == draft_logits.argmax(-1)).float().mean()
    print(f"draft's greedy agreement with the target on held-out text: {agreement:.3f}")
    prompts = windows[torch.linspace(0, len(windows) - 1, SAMPLES).long(), :PROMPT_TOKENS]
    for label, options in (("greedy", {"do_sample": False}), ("T=1", {"do_sample": True, "top_k": 0})):
        torch.manual_seed(0)
        texts = target.generate(prompts, max_new_tokens=SAMPLE_TOKENS, min_new_tokens=SAMPLE_TOKENS, **options)
        shares = [repeated_4grams(text[PROMPT_TOKENS:].tolist()) for text in texts]
        print(
            f"repeated 4-grams in {label} samples: mean {statistics.fmean(shares):.3f}, "
            f"median {statistics.median(shares):.3f}"
        )
