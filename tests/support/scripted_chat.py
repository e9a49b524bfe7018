"""A client whose model says what a test tells it, behind the real gateway and in front of the real openai package."""

import contextlib
import json
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
from openai import AsyncOpenAI
from tokenizers import AddedToken

from treeswarm.model_files import load_tokenizer, resolve_model
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.text_rules import Grammar
from treeswarm_client.chat_template import load_chat_template
from treeswarm_client.client import SwarmClient
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.config import GatewayConfig
from treeswarm_client.generation.loop import Committed, FinishReason
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.generation.runner import RunWriter
from treeswarm_client.generation.text_stream import StopText, TextStream, hidden_tokens
from treeswarm_client.prompt_encoder import PromptEncoder

CONTEXT = 4096


class ChattingClient:
    """Stands for an open SwarmClient: its tokenizer and template are real, its answers are `answer`."""

    def __init__(self, folder: Path, special: Sequence[str]) -> None:
        tokenizer = load_tokenizer(folder)
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        self.prompts = PromptEncoder("demo", tokenizer, load_chat_template(folder))
        self.tokenizer = tokenizer
        self.chat_template = self.prompts.chat
        self.has_chat_template = self.chat_template is not None
        self.generation_defaults = GenerationDefaults()
        numerics = NumericsClass("scripted", "float32")
        self.target = SimpleNamespace(max_positions=CONTEXT, blocks=1, numerics=numerics)
        self.view = SimpleNamespace(serving=lambda: [], missing=lambda: None)
        self.draft_choice = SimpleNamespace(automatic=False)
        self.answer = ""
        self.finish: FinishReason = "stop"
        self.prompt = ""
        """The last prompt as text."""
        self.options: dict[str, Any] = {}
        """The options of the last generation."""

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Take every grammar."""

    async def __aenter__(self) -> "ChattingClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def encode_chat(self, messages: Any, **options: Any) -> list[int]:
        return self.prompts.encode_chat(messages, **options)

    def encode(self, prompt: str, **options: Any) -> list[int]:
        return self.prompts.encode(prompt, **options)

    def decode(self, ids: Sequence[int]) -> str:
        return self.prompts.decode(ids)

    def stream(self, prompt: Sequence[int], **options: Any) -> Run:
        self.prompt, self.options = self.decode(prompt), options
        run = Run(tokens=cast("AsyncGenerator[Token, None]", None), prompt_ids=list(prompt))
        run.tokens = self._tokens(run, hidden_tokens(self.tokenizer, options.get("shown_special", ())))
        return run

    async def _tokens(self, run: Run, hidden: frozenset[int] | None) -> AsyncGenerator[Token, None]:
        text = TextStream(self.tokenizer, run.prompt_ids, hidden)
        writer = RunWriter(run, text, StopText(()), time.monotonic)
        ids = self.tokenizer.encode(self.answer, add_special_tokens=False).ids
        for at, token in enumerate(ids):
            finish = self.finish if at == len(ids) - 1 else None
            for one in writer.add(Committed((token,), (-1.0,), at + 1, finish)):
                yield one


@contextlib.asynccontextmanager
async def scripted_gateway(
    folder: Path, template: str, *, special: Sequence[str] = (), **config: Any
) -> AsyncIterator[tuple[ChattingClient, AsyncOpenAI]]:
    """Yield a client with this chat template, and the openai package before a gateway with it.

    `folder` is where the model's files are put.
    """
    shutil.copytree(resolve_model("demo"), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    client = ChattingClient(folder, special)
    backend = Backend(GatewayConfig(("demo",), **config), lambda: cast(SwarmClient, client))
    async with backend.open():
        transport = httpx2.ASGITransport(make_app(backend), raise_app_exceptions=False)
        http = httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
        async with AsyncOpenAI(
            base_url="http://127.0.0.1:8000/v1", api_key="k", max_retries=0, http_client=http
        ) as api:
            yield client, api


def hermes_call(name: str, **arguments: object) -> str:
    """Return a call as Qwen and Hermes write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
