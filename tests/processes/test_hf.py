"""The Hugging Face interface over real nodes gives the same results as transformers itself."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tests.support.hub_cache import COMMIT, add_to_cache
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from treeswarm.errors import BadRequest, ModelError
from treeswarm.model_files import resolve_model
from treeswarm_client import AutoSwarmModelForCausalLM
from treeswarm_client.local_swarm import LocalSwarm

PROMPTS = ["def main(", "import os\nimport sys\nimport ", "class Queue:\n    def ", "x", "for i in range(10):\n"]


@pytest.fixture(scope="module")
def model(three_nodes: LocalSwarm) -> Iterator[Any]:
    with AutoSwarmModelForCausalLM.from_pretrained("demo", peers=three_nodes.peers, draft="demo-draft") as opened:
        yield opened


@pytest.fixture(scope="module")
def stock() -> Any:
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"), padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def generate_same(model: Any, stock: Any, inputs: Any, **options: Any) -> torch.Tensor:
    """Return the output of both models, which must be the same."""
    ours, theirs = model.generate(**inputs, **options), stock.generate(**inputs, **options)
    assert ours.dtype == theirs.dtype
    assert ours.tolist() == theirs.tolist()
    return ours  # type: ignore[no-any-return]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_output_is_that_of_transformers(model: Any, stock: Any, tokenizer: Any, prompt: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt")
    assert generate_same(model, stock, inputs, max_new_tokens=40).shape[1] == inputs["input_ids"].shape[1] + 40
    generate_same(model, stock, inputs, max_length=inputs["input_ids"].shape[1] + 9, do_sample=False)


def test_padded_batch_gives_the_output_of_transformers(model: Any, stock: Any, tokenizer: Any) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    generate_same(model, stock, batch, max_new_tokens=24)
    generate_same(model, stock, batch, max_length=batch["input_ids"].shape[1] + 5)
    assert model.generate(batch, max_new_tokens=3).tolist() == model.generate(**batch, max_new_tokens=3).tolist()
    with pytest.warns(UserWarning, match="max_length"):
        expected = stock.generate(**batch)
    assert model.generate(**batch).tolist() == expected.tolist(), "transformers' default is 20 new tokens"


def test_rows_end_where_transformers_ends_them(model: Any, stock: Any, tokenizer: Any) -> None:
    """A row ends at one end token, at one of several, or at none; the rest of it is padding."""
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    start = batch["input_ids"].shape[1]
    plain = generate_same(model, stock, batch, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
    ends = [int(plain[0, start + 4]), int(plain[2, start + 9])]
    for eos in (ends[0], ends):
        ended = generate_same(model, stock, batch, max_new_tokens=24, eos_token_id=eos, pad_token_id=7)
        assert (ended[:, start:] == 7).any()
    first = {key: value[:1] for key, value in batch.items()}
    assert generate_same(model, stock, first, max_new_tokens=24, eos_token_id=ends[0]).shape[1] <= start + 5


@pytest.mark.parametrize("stops", [["\n"], ["self", "):"], ["in(", "range"], "never to be met"], ids=str)
def test_stop_strings_end_as_in_transformers(model: Any, stock: Any, tokenizer: Any, stops: Any) -> None:
    """The end of the prompt counts, and the text that completes the string is kept."""
    batch = tokenizer(PROMPTS[:3], return_tensors="pt", padding=True)
    out = generate_same(model, stock, batch, max_new_tokens=30, stop_strings=stops, tokenizer=tokenizer)
    assert model.generate(**batch, max_new_tokens=30, stop_strings=stops).tolist() == out.tolist(), (
        "the model uses its own tokenizer"
    )


def test_criteria_end_rows_as_in_transformers(model: Any, stock: Any, tokenizer: Any) -> None:
    def has_a_bracket(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.tensor([")" in tokenizer.decode(row[-1:]) for row in ids])

    batch = tokenizer(PROMPTS[:3], return_tensors="pt", padding=True)
    criteria = StoppingCriteriaList([has_a_bracket])
    ended = generate_same(model, stock, batch, max_new_tokens=30, stopping_criteria=criteria)
    assert (ended[:, batch["input_ids"].shape[1] :] == tokenizer.pad_token_id).any() or ended.shape[1] < 30
    at_once = model.generate(**batch, max_new_tokens=30, max_time=0.0)
    assert at_once.shape[1] == batch["input_ids"].shape[1] + 1
    assert generate_same(model, stock, batch, max_new_tokens=9, max_time=1e6).shape == (3, at_once.shape[1] + 8)


def test_transition_scores_are_those_of_transformers(model: Any, stock: Any, tokenizer: Any) -> None:
    batch = tokenizer(PROMPTS[:3], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    results = [
        one.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        for one in (model, stock)
        for out in [one.generate(**batch, **options)]
    ]
    assert torch.allclose(*results, atol=1e-4)
    sampled = model.generate(**batch, **options, do_sample=True, seed=1)
    for wrong in ({"normalize_logits": True}, {}):
        with pytest.raises(BadRequest):
            model.compute_transition_scores(sampled.sequences, sampled.scores, **wrong)
    assert (model.dtype, model.can_generate()) == (torch.float32, True)


def test_pipeline_of_transformers_works(
    model: Any, stock: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is transformers' own pipeline, batches and chats included."""
    texts = []
    for one in (model, stock):
        pipe = pipeline("text-generation", model=one, tokenizer=tokenizer)
        texts.append(
            [pipe(PROMPTS[0], max_new_tokens=9, do_sample=False), pipe(PROMPTS[:2], max_new_tokens=5, do_sample=False)]
        )
    assert texts[0] == texts[1]
    assert "not supported" not in caplog.text


def test_generation_config_of_the_model_is_honoured(three_nodes: LocalSwarm, tmp_path: Path, stock: Any) -> None:
    shutil.copytree(resolve_model("demo"), tmp_path, dirs_exist_ok=True)
    own = GenerationConfig(max_new_tokens=7, eos_token_id=0, repetition_penalty=1.2)
    ids = torch.tensor([[5, 6, 7]])
    own.save_pretrained(tmp_path)
    with AutoSwarmModelForCausalLM.from_pretrained(tmp_path, peers=three_nodes.peers, tree_size=0) as model:
        penalised = stock.generate(ids, max_new_tokens=7, repetition_penalty=1.2)
        assert model.generate([[5, 6, 7]]).tolist() == penalised.tolist()
        out = model.generate([[5, 6, 7]], repetition_penalty=1.0)
        assert out.tolist() == stock.generate(ids, max_new_tokens=7).tolist()
        model.generation_config.repetition_penalty = None
        given = GenerationConfig(max_new_tokens=9)
        assert model.generate([[5, 6, 7]], given).shape == (1, 12)


def test_samples_differ_and_a_seed_repeats_them(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(["def main(", "def main("], return_tensors="pt")
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "temperature": 1.2}
    sampled = model.generate(**batch, seed=5, **options)
    assert len(set(map(tuple, sampled.tolist()))) == 6, "samples of equal rows differ too"
    assert model.generate(**batch, seed=5, **options).tolist() == sampled.tolist()
    assert model.generate(**batch, seed=6, **options).tolist() != sampled.tolist()
    drawn = [model.generate(**batch, generator=torch.Generator().manual_seed(3), **options).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1]
    with_global_seed = []
    for _ in range(2):
        torch.manual_seed(11)
        with_global_seed += [model.generate(**batch, **options).tolist(), model.generate(**batch, **options).tolist()]
    assert with_global_seed[:2] == with_global_seed[2:]
    assert with_global_seed[0] != with_global_seed[1]
    with pytest.raises(BadRequest, match="give one"):
        model.generate(**batch, seed=1, generator=torch.Generator(), **options)


class RecordingStreamer(BaseStreamer):  # type: ignore[misc]
    """Records what a streamer receives."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


def test_streamer_receives_the_prompt_and_each_traversal(model: Any, three_nodes: LocalSwarm, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS[2], return_tensors="pt")
    recorder = RecordingStreamer()
    # Trees of a fixed size: on a busy machine the planner may find that none pays.
    fixed = AutoSwarmModelForCausalLM.from_pretrained("demo", peers=three_nodes.peers, draft="demo-draft", tree_size=16)
    with fixed:
        out = fixed.generate(**inputs, max_new_tokens=40, streamer=recorder, return_dict_in_generate=True)
    assert recorder.values[0] == inputs["input_ids"][0].tolist()
    assert list(chain.from_iterable(recorder.values)) == out.sequences[0].tolist()
    assert len(recorder.values) - 1 == out.runs[0].stats.traversals < 40, "several tokens per traversal"
    assert recorder.ends == 1
    stopped = RecordingStreamer()
    ended = model.generate(**inputs, max_new_tokens=40, streamer=stopped, stop_strings="self")
    assert list(chain.from_iterable(stopped.values)) == ended[0].tolist()
    with pytest.raises(BadRequest, match="one text"):
        model.generate(**tokenizer(["a", "b"], return_tensors="pt"), streamer=recorder)


def test_streamed_text_is_the_generated_text(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    results: list[torch.Tensor] = []
    thread = Thread(target=lambda: results.append(model.generate(**inputs, max_new_tokens=40, streamer=streamer)))
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    new = results[0][0, inputs["input_ids"].shape[1] :]
    assert streamed == tokenizer.decode(new)
    model.generate(**inputs, max_new_tokens=40, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(results[0][0]) + "\n"


def test_streamer_that_raises_frees_the_session(model: Any, tokenizer: Any) -> None:
    class BrokenStreamer(RecordingStreamer):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.values) == 3:
                raise OSError("the terminal is gone")

    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    broken = BrokenStreamer()
    with pytest.raises(OSError, match="terminal"):
        model.generate(**inputs, max_new_tokens=200, streamer=broken)
    assert broken.ends == 1
    assert not model.client.client._runs
    assert model.generate(**inputs, max_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


def test_threads_generate_concurrently(model: Any, tokenizer: Any) -> None:
    inputs = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    alone = [model.generate(**batch, max_new_tokens=30).tolist() for batch in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        together = list(pool.map(lambda batch: model.generate(**batch, max_new_tokens=30).tolist(), inputs))
    assert together == alone


def test_inference_session_continues_its_text(model: Any, stock: Any, tokenizer: Any) -> None:
    turns = ["class Reader:\n", "\n    def read(self):\n", "\n    def close(self):\n", "\n\ndef main():\n"]
    prefix_sizes: list[int] = []
    text = torch.empty((1, 0), dtype=torch.int64)
    with model.inference_session() as session:
        for turn in turns:
            new = tokenizer(turn, return_tensors="pt")
            text = torch.cat([text, new["input_ids"]], 1)
            mask = torch.ones_like(text)
            text = stock.generate(text, attention_mask=mask, max_new_tokens=80, eos_token_id=None, pad_token_id=0)
            out = session.generate(**new, max_new_tokens=80, eos_token_id=None)
            assert out.tolist() == text.tolist() == session.token_ids.tolist()
            prefix_sizes.append(session.prefix_tokens)
        inside = int(text[0, 5])
        more = session.generate(max_new_tokens=4, eos_token_id=None, pad_token_id=inside, return_dict_in_generate=True)
        assert more.sequences.shape[1] == text.shape[1] + 4
        with pytest.raises(BadRequest, match="one text"):
            session.generate([[1], [2]])
        with pytest.raises(BadRequest, match="one text"):
            session.generate([[1]], do_sample=True, num_return_sequences=2, max_new_tokens=2)
        assert session.token_ids.tolist() == more.sequences.tolist()
    assert prefix_sizes[0] == 0
    assert prefix_sizes == sorted(set(prefix_sizes)), "each turn reuses more than the one before"
    assert prefix_sizes[-1] >= text.shape[1] // 2
    with pytest.raises(BadRequest, match="closed"):
        session.generate([[1]])


def test_model_has_config_device_and_repr(model: Any, stock: Any, three_nodes: LocalSwarm) -> None:
    assert model.config.to_dict() == stock.config.to_dict() | {"dtype": model.config.to_dict()["dtype"]}
    assert model.generation_config.eos_token_id == 0
    assert model.device == torch.device("cpu")
    assert repr(model) == (
        f"AutoSwarmModelForCausalLM('demo', peers='{three_nodes.peers}': llama, 8 blocks on 3 nodes, float32)"
    )
    out = model.generate([[5, 6, 7]], max_new_tokens=4, return_dict_in_generate=True)
    assert out["sequences"].shape == (1, 7)
    assert len(out.logprobs[0]) == 4
    assert out.runs[0].finish_reason == "length"


def test_unsupported_options_and_a_closed_model_are_refused(three_nodes: LocalSwarm) -> None:
    model = AutoSwarmModelForCausalLM.from_pretrained(
        "demo", peers=three_nodes.peers, draft="none", prefix_scope="none"
    )
    with pytest.raises(BadRequest, match="prefix_scope='none'"):
        model.inference_session()
    with pytest.raises(BadRequest, match="output_logits"):
        model.generate([[5]], output_logits=True)
    model.close()
    with pytest.raises(BadRequest, match="not open"):
        model.generate([[5]], max_new_tokens=2)
    with pytest.raises(BadRequest, match="device_map"):
        AutoSwarmModelForCausalLM.from_pretrained("demo", peers=three_nodes.peers, device_map="auto")


PROGRAM = """
import sys
from treeswarm_client import AutoSwarmModelForCausalLM
with AutoSwarmModelForCausalLM.from_pretrained("org/big", peers=sys.argv[1], draft="org/small+ngram") as model:
    print(model.generate([[5, 6, 7]], max_new_tokens=8).tolist())
"""


def test_hub_cache_and_its_variables_are_honoured(three_nodes: LocalSwarm, model: Any, tmp_path: Path) -> None:
    """Offline, target and draft are found by hub id in HF_HOME, and also in other cache folders and revisions."""
    add_to_cache(tmp_path / "hub", "org/big", "demo")
    add_to_cache(tmp_path / "hub", "org/small", "demo-draft")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, three_nodes.peers], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(model.generate([[5, 6, 7]], max_new_tokens=8).tolist())

    add_to_cache(tmp_path / "other", "org/big", "demo", ref="v2")
    options = {"cache_dir": tmp_path / "other", "local_files_only": True, "peers": three_nodes.peers, "tree_size": 0}
    with AutoSwarmModelForCausalLM.from_pretrained("org/big", revision="v2", token=False, **options) as other:
        assert other.folder == tmp_path / "other" / "models--org--big" / "snapshots" / COMMIT
        assert other.config.num_hidden_layers == 8
    with pytest.raises(ModelError, match=r"revision 'v3' of 'org/big' is not in the cache .*local_files_only"):
        AutoSwarmModelForCausalLM.from_pretrained("org/big", revision="v3", **options)
