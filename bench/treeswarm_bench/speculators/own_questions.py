"""Questions that a chat model makes up itself.

A chat model continues the beginning of a user's message with a question such as it was trained on: the chat template
ends where the question would stand, and the model writes it (Magpie, arXiv 2406.08464).  The answers to these questions
are closer to what users get than those to any list of topics.
"""

from typing import Any

from treeswarm_bench.speculators.writing import end_tokens, write_texts
from treeswarm_client.prompt_encoder import PromptEncoder

# SmolLM2-135M asks sensible questions at 0.7, and at 1.0 every third one is noise.
TEMPERATURE = 0.8
# Questions of other lengths are dropped: the shorter are greetings, the longer leave no room for an answer.
FEWEST_TOKENS, MOST_TOKENS = 4, 64


def question_frame(encoder: PromptEncoder) -> tuple[list[int], int | None]:
    """Return the tokens of a conversation before its first question, and the token that ends the question.

    The token is None where the template tells no question's end by a token of its own.
    """
    one, other = (encoder.encode_chat([{"role": "user", "content": text}]) for text in ("Why", "A b"))
    before = _common_length(one, other)
    after = _common_length(one[::-1], other[::-1])
    return one[:before], one[len(one) - after] if after else None


def own_questions(model: Any, encoder: PromptEncoder, count: int, seed: int) -> list[str]:
    """Return up to `count` questions that the model makes up, the same ones for the same seed."""
    prefix, end = question_frame(encoder)
    if not prefix or end is None:
        return []
    length = len(prefix) + MOST_TOKENS
    texts = write_texts(model, [prefix] * count, length, temperature=TEMPERATURE, seed=seed, ends=(end,))
    ends = end_tokens(model) | {end}
    questions = []
    for text in texts:
        tokens = text[len(prefix) :]
        if tokens[-1] in ends and len(tokens) > FEWEST_TOKENS:
            questions.append(encoder.decode(tokens[:-1]).strip())
    return [question for question in questions if question]


def _common_length(one: list[int], other: list[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
