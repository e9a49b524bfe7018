"""Check a published head while it loads, on texts that the model writes by itself: for a node of the whole model."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import torch

from treeswarm.errors import ModelError
from treeswarm.model_files import load_tokenizer
from treeswarm.protocol.messages import Answers, Append
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.kv_cache.kv_store import SessionKV
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.model.taps import Taps
from treeswarm_node.speculator.seam import SpeculationRequest
from treeswarm_node.speculator.self_check import CHECKED_TOKENS, COMPARED_NODES, CheckedSpeculator, HeadVerdict

log = logging.getLogger(__name__)

# Beginnings of ordinary texts: an answer, an explanation, a story and a program.
PROMPTS = (
    "Question: What should I pack for a week of walking in the mountains?\nAnswer:",
    "The water cycle is the way in which water moves between the sea, the air and the land.",
    "The old lighthouse keeper had not spoken to anyone for three weeks when he saw the boat.",
    'def count_words(text):\n    """Return how often each word occurs in a text."""\n',
)
# Number of tokens that are generated between two guesses, about what one traversal with a head brings.
STRIDE = 3
# Number of tokens after each prompt: a small model that goes on greedily begins to repeat itself soon after, and of
# repetitions n-grams are better guessers than any head.
TEXT_TOKENS = CHECKED_TOKENS // len(PROMPTS) + STRIDE
# Seconds that the check may take: the node of a large model on a CPU goes on with the texts of its first sessions.
LONGEST_S = 20.0


def check_at_load(
    model: SpanModel, speculator: CheckedSpeculator, folder: Path, clock: Callable[[], float] = time.monotonic
) -> None:
    """Let the whole model write texts while the head guesses.  `folder` is the model's directory.

    Raises ModelError if the head is no better than n-grams.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError:  # its clients have one, and their texts are checked
        return
    end = clock() + LONGEST_S
    for prompt in PROMPTS:
        with contextlib.closing(guess_along(model, speculator, tokenizer.encode(prompt).ids, TEXT_TOKENS)) as texts:
            while speculator.comparison.verdict is HeadVerdict.OPEN and clock() < end and next(texts, None) is not None:
                pass
    if speculator.comparison.verdict is HeadVerdict.REFUSED:
        raise ModelError(
            f"the head in '{speculator.source}' is no better than n-grams ({speculator.comparison}): it may be for "
            "another model; give another one, or --speculator none"
        )
    log.info("the head in '%s' was checked: %s", speculator.source, speculator.comparison)


@torch.inference_mode()
def guess_along(
    model: SpanModel, speculator: CheckedSpeculator, prompt: Sequence[int], count: int
) -> Generator[list[int]]:
    """Generate `count` tokens greedily, with a proposal every few tokens; yield the text after each token."""
    rows = len(prompt) + count
    session = NodeSession(SessionTerms(0, rows, 1, rows, int(model.loaded.config.vocab_size), 0))
    kv, memory = model.store.open(rows, 1), speculator.new_memory()
    text, unread, read = list(prompt), [], 0
    try:
        for step in range(count):
            new = text[len(text) - (len(prompt) if step == 0 else 1) :]
            hidden, states = _forward(model, session, kv, step, len(text) - len(new), new, speculator.taps)
            unread.append(states)
            text.append(int(model.logits(hidden[-1:]).argmax()))
            if step % STRIDE == 0:
                following = np.array(text[read + 1 :], np.int64)
                request = SpeculationRequest(
                    memory, read, torch.cat(unread), following, SamplingSettings(), COMPARED_NODES
                )
                for _ in speculator.propose(request):
                    pass
                unread, read = [], len(text) - 1
            yield text
    finally:
        kv.close()


def _forward(
    model: SpanModel, session: NodeSession, kv: SessionKV, seq: int, start: int, tokens: list[int], taps: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add tokens to the trunk, and return the last activations and the states of their rows."""
    count = len(tokens)
    append = Append(
        epoch=0,
        seq=seq,
        commit=np.empty(0, np.uint32),
        first_id=start + 1,
        parents=np.arange(start, start + count, dtype=np.uint32),
        tokens=np.array(tokens, np.uint32),
        prefill=True,
        answers=Answers.NONE,
        settings=SamplingSettings(),
        skipped=np.zeros(count, np.bool_),
    )
    (step,) = session.receive(append)
    recorded = Taps(taps)
    hidden = model.embed(
        torch.from_numpy(step.tokens).to(model.device), torch.from_numpy(step.positions).to(model.device)
    )
    result = model.forward([Segment(kv, step, model.loaded.span)], hidden, recorded)
    return result, recorded.states()
