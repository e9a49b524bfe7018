"""What a target writes for a training: the same texts as transformers' own generation, and questions of its own."""

from pathlib import Path

import numpy as np
import torch
from tests.bench.speculators.test_training import decided_model, encoder

from treeswarm_bench.speculators.own_questions import own_questions, question_frame
from treeswarm_bench.speculators.reads import BATCH, KeptReadings
from treeswarm_bench.speculators.samples import padded
from treeswarm_bench.speculators.target import TappedTarget
from treeswarm_bench.speculators.writing import next_tokens, write_texts
from treeswarm_client.chat_template import load_chat_template
from treeswarm_client.prompt_encoder import PromptEncoder

END = 7


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(8, 199, int(n)).tolist() for n in random.integers(3, 20, count)]


def test_greedy_texts_are_those_of_transformers_although_ended_rows_are_dropped() -> None:
    model = decided_model()
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts(12):
        (text,) = model.generate(torch.tensor([prompt]), max_new_tokens=30 - len(prompt), do_sample=False).tolist()
        expected.append(text)
    # Tokens of these texts end them, so that some rows end early and are dropped.
    ends = {text[len(prompt) + 4] for text, prompt in zip(expected[::2], prompts(12)[::2], strict=True)}
    for text, prompt in zip(expected, prompts(12), strict=True):
        stop = next((i for i in range(len(prompt), len(text)) if text[i] in ends), len(text) - 1)
        del text[stop + 1 :]
    assert len({len(text) - len(prompt) for text, prompt in zip(expected, prompts(12), strict=True)}) > 2
    assert write_texts(model, prompts(12), 30, temperature=0.0, seed=0, ends=ends) == expected


def test_sampled_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, -2.0])
    drawn = next_tokens(logits.repeat(40_000, 1), 2.0, torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, torch.softmax(logits / 2, -1), atol=0.01)
    assert next_tokens(logits[None], 0.0, torch.Generator()).tolist() == [2]


def test_a_chat_model_makes_up_questions_where_its_template_has_them(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + chr(END) + "{% endfor %}<assistant>"
    (tmp_path / "chat_template.jinja").write_text(template, "utf-8")
    chats = PromptEncoder("tiny", encoder().tokenizer, load_chat_template(tmp_path))
    before, end = question_frame(chats)
    assert chats.decode(before).replace(" ", "") == "<user>"
    assert end == END
    model = decided_model()
    questions = own_questions(model, chats, 20, seed=3)
    assert questions == own_questions(model, chats, 20, seed=3)
    assert questions != own_questions(model, chats, 20, seed=4)


def test_a_text_is_read_alike_whatever_step_asks_for_it() -> None:
    target = TappedTarget(decided_model(), (2, 3))
    samples = padded([[*prompt * 3] for prompt in prompts(2 * BATCH + 3)], 40)
    every, none = (KeptReadings(target, torch.arange(199), samples, most_bytes=limit) for limit in (1 << 30, 0))
    one, other = every.of(np.array([20, 3, 20])), none.of(np.array([3, 20]))
    assert torch.equal(one.states[1, : samples.lengths[3]], other.states[0, : samples.lengths[3]])
    assert torch.equal(one.states[0], one.states[2])
    states, logits = target.read(one.tokens[1:2, : samples.lengths[3]])
    real = one.real[1]
    assert int(real.sum()) == samples.lengths[3]
    assert torch.allclose(one.states[1][real], states[0], atol=1e-5)
    assert one.best[1][real].tolist() == logits[0].argmax(-1).tolist()
    assert sum(len(group.tokens) for group in every.groups()) == len(samples)
