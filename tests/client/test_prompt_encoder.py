"""Texts become token ids beside other work, and texts that cannot fit are refused before that."""

import threading
import time

import pytest

from treeswarm.errors import BadRequest, TooLong
from treeswarm.model_files import resolve_model
from treeswarm_client.prompt_encoder import LEAST_SHARE, PromptEncoder, load_prompt_encoder


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return load_prompt_encoder("demo", resolve_model("demo"), max_positions=1024)


def test_other_threads_run_while_a_long_text_is_encoded(encoder: PromptEncoder) -> None:
    begun, done, turns = threading.Event(), threading.Event(), 0

    def encode() -> None:
        begun.set()
        encoder.encode("a b " * 10_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    begun.wait()
    while not done.is_set():
        turns += 1
        time.sleep(0)
    thread.join()
    # If the tokenizer held the interpreter's lock, this thread would turn two or three times.  Seen: 28,715.
    assert turns > 50


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(encoder: PromptEncoder) -> None:
    longest = max(len(token) for token in encoder.tokenizer.get_vocab())
    assert encoder.most_characters == 1024 * longest * LEAST_SHARE
    encoder.encode("a" * 2000)
    with pytest.raises(TooLong, match=r"a text of \d+ characters cannot fit .*1024 tokens"):
        encoder.encode("a" * (encoder.most_characters + 1))


def test_ids_are_the_tokenizers(encoder: PromptEncoder) -> None:
    text = "def füür(x):\n\treturn '日本' * 3  # 🌳" * 400
    assert encoder.encode(text) == encoder.tokenizer.encode(text).ids
    with pytest.raises(BadRequest, match="lone surrogates"):
        encoder.encode("\ud800")
