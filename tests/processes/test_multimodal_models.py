"""Real nodes host the text part of a multimodal model: its text is stock's, and an image is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from openai import BadRequestError
from safetensors.torch import load_file, save_file
from tests.families.checkpoint import randomise
from tests.families.configs import LAYERS
from tests.families.wrapper_configs import tiny_wrapper_config
from tests.processes.conftest import save_tokenizer
from tests.support.gateway_process import gateway
from transformers import AutoModelForMultimodalLM

from treeswarm.model_files import INDEX, SINGLE
from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import local_swarm
from treeswarm_client.reference import stock_greedy

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]  # four processes load torch
TOKENS = 24
SPANS = [Span(0, 2), Span(2, 4), Span(4, LAYERS)]
QUESTION = "the 7 quick brown foxes"
# As those of published multimodal models: it reads parts of a message, and writes nothing of a plain text.
TEMPLATE = """{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}
{%- if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def save_model(folder: Path) -> None:
    """Save a tiny Gemma 3 with images, a tokenizer, and the chat template in its processor's file."""
    config = tiny_wrapper_config("gemma3")
    config.text_config.vocab_size = save_tokenizer(folder)
    config.text_config.eos_token_id = 0
    config.image_token_id = config.text_config.vocab_size + 6  # as published: no text has it
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def divide_weights(folder: Path) -> Path:
    """Move the weights of the image part to a file of their own, and return its path."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: f"{'text' if 'language_model' in name else 'images'}.safetensors" for name in tensors}
    for file in {*files.values()}:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / "images.safetensors"


async def test_text_is_stocks_without_the_image_part(tmp_path: Path) -> None:
    whole, hosted = tmp_path / "whole", tmp_path / "hosted"
    save_model(whole)
    images = divide_weights(whole)
    shutil.copytree(whole, hosted)
    (hosted / images.name).unlink()
    async with (
        local_swarm(str(hosted), SPANS) as swarm,
        SwarmClient(str(hosted), peers=swarm.peers) as client,
        gateway(swarm.peers, "--model", str(hosted)) as served,
    ):
        chat = client.encode_chat([{"role": "user", "content": QUESTION}])
        assert client.decode(chat) == f"user: {QUESTION}assistant:"
        prompts = [client.encode(QUESTION), client.encode("lazy dogs jump over 21 foxes\n" * 4), chat]
        stock = await stock_greedy(whole, prompts, TOKENS, "float32")
        for prompt, expected in zip(prompts, stock.token_ids, strict=True):
            for size in (0, 8):
                run = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=size, ignore_eos=True)
                assert run.token_ids == expected, f"tree size {size}"
        ask, name = served.openai().chat.completions.create, str(hosted)
        asked = [{"role": "user", "content": QUESTION}]
        reply = await ask(model=name, messages=asked, max_tokens=TOKENS, temperature=0)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == (await client.generate(chat, max_new_tokens=TOKENS)).text
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        with pytest.raises(BadRequestError, match="image_url cannot be honoured: this model reads text only"):
            await ask(model=name, messages=[{"role": "user", "content": [image]}])  # type: ignore[list-item]
    for node in swarm.nodes:
        assert "'gemma3' is a multimodal model: its text part alone is hosted" in (await node.errors).decode()
