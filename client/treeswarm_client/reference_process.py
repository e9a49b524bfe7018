"""Run a stock transformers model: the reference against which exactness is measured.

Run as a program, in a process of its own that imports transformers and torch and nothing of this project:

    echo '{"model": DIR, "prompts": [[1, 2]], "max_new_tokens": 8, "dtype": "float32"}' | python reference_process.py

It prints `{"token_ids": [[…]], "gaps": [[…]], "versions": {…}}`: greedy continuations that no token stops, and for each
token the gap between the two best logits.  With `"forced": [[…]]` it generates no text: it prints, for each prompt, its
own choice and gap at every position of the given text (teacher forcing).
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a request from standard input, and print the reply."""
    import torch  # noqa: PLC0415  # this file is also imported for its path alone
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()
    request = json.load(sys.stdin)
    torch.set_num_threads(int(request.get("threads", 1)))
    # A directory whose weights are in a GGUF file: transformers reads config and weights from that file alone.
    gguf = {"gguf_file": "model.gguf"} if Path(request["model"], "model.gguf").exists() else {}
    config = transformers.AutoConfig.from_pretrained(request["model"], **gguf)
    auto_class = transformers.AutoModelForCausalLM
    if config.get_text_config(decoder=True) is not config:  # a multimodal model, whose own class is asked for text
        auto_class = transformers.AutoModelForMultimodalLM
    model = auto_class.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]), **gguf).eval()
    texts: list[list[int]] = []
    gaps: list[list[float]] = []
    with torch.inference_mode():
        for i, prompt in enumerate(request["prompts"]):
            text, gap = (
                _forced(model, prompt, request["forced"][i])
                if "forced" in request
                else _greedy(model, prompt, int(request["max_new_tokens"]))
            )
            texts.append(text)
            gaps.append(gap)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"token_ids": texts, "gaps": gaps, "versions": versions}))


def _greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Generate one token at a time with the model's own KV cache: plain decoding."""
    import torch  # noqa: PLC0415

    cache, ids = None, torch.tensor([prompt])
    text: list[int] = []
    gaps: list[float] = []
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token, gap = _choice(output.logits[0, -1])
        text.append(token)
        gaps.append(gap)
        ids = torch.tensor([[token]])
    return text, gaps


def _forced(model: Any, prompt: list[int], text: list[int]) -> tuple[list[int], list[float]]:
    import torch  # noqa: PLC0415

    logits = model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0]
    choices = [_choice(row) for row in logits[len(prompt) - 1 : -1]]
    return [token for token, _ in choices], [gap for _, gap in choices]


def _choice(logits: Any) -> tuple[int, float]:
    best = logits.float().topk(2)
    return int(best.indices[0]), float(best.values[0] - best.values[1])


if __name__ == "__main__":
    main()
