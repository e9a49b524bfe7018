"""A client that answers with scripted texts, for tests of what the gateway makes of them."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
from tokenizers import Tokenizer

import treeswarm
from treeswarm.errors import SwarmError
from treeswarm.model_files import load_tokenizer
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import Grammar
from treeswarm_client.gateway.app import make_app
from treeswarm_client.gateway.backend import Backend
from treeswarm_client.gateway.config import ApiKeys, GatewayConfig, GatewayLimits
from treeswarm_client.generation.run import Run, Token
from treeswarm_client.generation.text_stream import StopText, TextStream
from treeswarm_client.generation.token_logprobs import TokenLogprobs
from treeswarm_client.prompt_encoder import PromptEncoder, check_request, load_prompt_encoder

DEMO = Path(treeswarm.__file__).parent / "models" / "demo"
NO_KEYS = ApiKeys()
CONTEXT = 2048


class ScriptedClient:
    """Has what the gateway uses of `SwarmClient`, and answers every prompt with the same text."""

    def __init__(
        self, answer: str, *, fails: SwarmError | None = None, defaults: GenerationDefaults | None = None
    ) -> None:
        """`fails` ends each answer in place of its last token."""
        self.tokenizer: Tokenizer = load_tokenizer(DEMO)
        self.prompts: PromptEncoder = load_prompt_encoder("demo", DEMO)
        self.answer = self.prompts.encode(answer, special=False)
        self.fails = fails
        self.generation_defaults = defaults or GenerationDefaults()
        self.target = SimpleNamespace(
            numerics=NumericsClass("ab" * 32, "float32", "none"), max_positions=CONTEXT, vocab_size=4096, blocks=8
        )
        self.chat_template = self.prompts.chat
        self.view = SimpleNamespace(serving=tuple, missing=lambda: None)
        self.calls: list[Mapping[str, Any]] = []
        """Arguments of every call of `stream`."""
        self.encode, self.decode, self.encode_chat = self.prompts.encode, self.prompts.decode, self.prompts.encode_chat

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Take every grammar."""

    def stream(self, prompt: Sequence[int], **options: Any) -> Run:
        """Return a run of the scripted text, which ends as one of a swarm does."""
        self.calls.append({"prompt": list(prompt), **options})
        least = 1 if options["prompt_logprobs"] is None else 0
        check_request(prompt, options["max_new_tokens"], self.target.vocab_size, CONTEXT, least=least)
        SamplingSettings(**{name: options[name] for name in ("temperature", "top_p", "top_k") if name in options})
        run = Run(tokens=_none(), prompt_ids=list(prompt))
        run.tokens = self._tokens(run, options["max_new_tokens"], tuple(options["stop"]), options["top_logprobs"])
        if (top := options["prompt_logprobs"]) is not None:
            scores = [TokenLogprobs(token, -0.5, likeliest(token, -0.5)[:top]) for token in prompt[1:]]
            run.prompt_logprobs = [None, *scores]
        return run

    async def _tokens(self, run: Run, length: int, stops: tuple[str, ...], top: int) -> AsyncGenerator[Token, None]:
        text, stop = TextStream(self.tokenizer, run.prompt_ids), StopText(stops)
        ids = self.answer[:length]
        for at, token in enumerate(ids):
            is_last = at == len(ids) - 1
            if is_last and self.fails is not None:
                raise self.fails
            piece = stop.add(text.add(token))
            if stop.hit is not None:
                run.finish_reason, run.stop_string = "stop", stop.hit
            elif is_last:
                piece += stop.flush()
                run.finish_reason = "length" if length <= len(self.answer) else "stop"
            run.token_ids.append(token)
            run.logprobs.append(-0.25)
            run.text += piece
            yield Token(token, piece, -0.25, at, top_logprobs=likeliest(token, -0.25)[:top])
            if stop.hit is not None:
                return


def likeliest(token: int, logprob: float) -> tuple[tuple[int, float], ...]:
    """Return a token, and two others that are less likely."""
    return ((token, logprob), (token - 1, logprob - 1), (token - 2, logprob - 2))


async def _none() -> AsyncGenerator[Token, None]:
    return
    yield


def scripted_backend(client: ScriptedClient, keys: ApiKeys = NO_KEYS, **limits: Any) -> Backend:
    """Return a backend that is connected to a scripted client."""
    make_client: Callable[[], Any] = lambda: client  # noqa: E731
    address = Address("127.0.0.1", 8000)
    config = GatewayConfig(("demo",), address, keys, limits=GatewayLimits(**limits))
    backend = Backend(config, make_client)
    backend.connection._client = client  # type: ignore[assignment]
    return backend


def scripted_http(client: ScriptedClient, keys: ApiKeys = NO_KEYS) -> httpx2.AsyncClient:
    """Return a client of HTTP for a gateway in this process, which answers with a scripted text."""
    transport = httpx2.ASGITransport(make_app(scripted_backend(client, keys)), raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")
