"""`AutoSwarmModelForCausalLM`: transformers' `generate`, computed by a swarm."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from treeswarm.errors import BadRequest, ModelError
from treeswarm.keys import read_swarm_key
from treeswarm.model_files import HubOptions
from treeswarm_client.chain.shared_prompt import PrefixScope
from treeswarm_client.client import DEFAULT_PATIENCE_S
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.hf.arguments import GenerateArguments, check_loading, read_arguments
from treeswarm_client.hf.decoding import StopCheck, generate_rows, never_stop, stop_at_strings, stream_traversals
from treeswarm_client.hf.inference_session import InferenceSession
from treeswarm_client.hf.prompts import PromptBatch, check_token_types, join_continuations, make_batch, unpack_inputs
from treeswarm_client.sync import SyncSwarmClient

# What torch can draw from a generator in one go.
SEEDS = 2**63 - 1


@dataclass
class SwarmGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers has no types here
    """What `generate` returns with `return_dict_in_generate=True`."""

    sequences: torch.Tensor | None = None
    """int64 [rows × samples, length], prompts included."""
    logprobs: tuple[tuple[float, ...], ...] | None = None
    """Of every new token, row by row: what the model gave the token chosen."""
    runs: tuple[Run, ...] | None = None
    """Each with `stats`, `prefix_tokens`, `text` and `finish_reason`."""


class AutoSwarmModelForCausalLM:
    """A causal language model whose layers are on a swarm's nodes; `generate` is that of transformers.

        with AutoSwarmModelForCausalLM.from_pretrained("org/model", registry="host:4001") as model:
            print(tokenizer.batch_decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)))

    Greedy texts are those of transformers, sampled ones follow the same distribution and are repeated by their seed.
    Any number of threads may generate at once.  What a swarm cannot honour is refused with BadRequest.
    """

    def __init__(self, client: SyncSwarmClient) -> None:
        """Around an open client; `from_pretrained` makes both."""
        self._client = client
        folder = client.client.folder
        self.name_or_path = client.client.model
        self.config = _config(folder)
        """transformers' own of this model."""
        self.generation_config = _generation_config(folder, self.config)
        """What `generate` takes where its arguments say nothing."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        registry: str | None = None,
        peers: str | None = None,
        draft: str = "auto",
        draft_device: str = "cpu",
        swarm_key: bytes | str | Path | None = None,
        prefix_scope: PrefixScope = "client",
        tree_size: TreeSize = "auto",
        patience: float = DEFAULT_PATIENCE_S,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        emulate_link: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Find the nodes that serve a model, given as a directory, a hub id or `demo`.

        `registry` or `peers` say where nodes are; `swarm_key` is a private swarm's key, or the file that has it;
        the other swarm options are `SwarmClient`'s.  `revision`, `cache_dir`, `token` and `local_files_only` are
        `huggingface_hub`'s, whose environment variables count too.  Only config and tokenizer are read, and the draft
        model.  Raises what entering a `SwarmClient` does.
        """
        check_loading(options)
        client = SyncSwarmClient(
            model=str(pretrained_model_name_or_path),
            registry=registry,
            peers=peers,
            draft=draft,
            draft_device=draft_device,
            swarm_key=swarm_key if swarm_key is None or isinstance(swarm_key, bytes) else read_swarm_key(swarm_key),
            prefix_scope=prefix_scope,
            tree_size=tree_size,
            patience=patience,
            dtype=str(dtype).removeprefix("torch.") if dtype not in (None, "auto") else None,
            quantization=quantization,
            emulate_link=emulate_link,
            hub=HubOptions(revision, cache_dir, token, local_files_only),
        )
        client.__enter__()
        try:
            return cls(client)
        except BaseException:
            client.close()
            raise

    @property
    def device(self) -> torch.device:
        """Where ids are wanted; any other device's are taken too, and answered there."""
        return torch.device("cpu")

    @property
    def folder(self) -> Path:
        """Config and tokenizer of the very revision in use: `AutoTokenizer.from_pretrained(model.folder)`."""
        return self._client.client.folder

    @property
    def client(self) -> SyncSwarmClient:
        """The client behind it: for `overview`, streams of text, and everything else."""
        return self._client

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        token_type_ids: Any = None,
        **options: Any,
    ) -> Any:
        """Continue every row of a batch: int64 [rows × num_return_sequences, length], prompts included, padded on the
        right; with `return_dict_in_generate` a SwarmGenerateOutput.

        `inputs` is [rows, tokens], padded on the left, or a tokenizer's whole output.  Options, defaults and their
        order are those of transformers.  `seed`, or a seed drawn from `generator`, or from torch's global one, fixes
        what is sampled.  `streamer` is told the prompt, then what each round trip brings, in this thread.  Raises
        BadRequest for what cannot be honoured, and while generating NodeLost, Refused and the other SwarmErrors.
        """
        check_token_types(token_type_ids)
        asked = self._asked(generation_config, options)
        prompts = make_batch(*unpack_inputs(inputs, input_ids, attention_mask), asked)
        runs = self._run(asked, prompts, streamer, self._ended(asked, tokenizer), _seed_of(asked, seed, generator))
        sequences = join_continuations(prompts, asked, [run.token_ids for run in runs])
        if not asked.as_output:
            return sequences
        logprobs = tuple(tuple(run.logprobs) for run in runs)
        return SwarmGenerateOutput(sequences=sequences, logprobs=logprobs, runs=tuple(runs))

    def inference_session(self) -> InferenceSession:
        """A text that several calls of `generate` continue, whose KV the nodes keep between them.  Raises BadRequest
        where this client shares no prefixes."""
        return InferenceSession(self)

    def close(self) -> None:
        """Say goodbye to the nodes; generations under way end with BadRequest."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        client = self._client.client
        where = f"peers={client.peers!r}" if client.registry is None else f"registry={client.registry!r}"
        nodes, numerics = len(client.view.snapshot), client.target.numerics
        bits = "" if numerics.quantization == "none" else f" in {numerics.quantization}"
        return (
            f"{type(self).__name__}({self.name_or_path!r}, {where}: {self.config.model_type}, "
            f"{client.target.blocks} blocks on {nodes} node{'s' * (nodes != 1)}, {numerics.dtype}{bits})"
        )

    def _asked(self, generation_config: Any, options: Mapping[str, Any]) -> GenerateArguments:
        passed = {} if generation_config is None else _values_of(generation_config)
        where = f"the generation_config.json of '{self.name_or_path}'"
        return read_arguments(options, passed, _values_of(self.generation_config), where)

    def _ended(self, asked: GenerateArguments, tokenizer: Any) -> StopCheck:
        if not asked.stop_strings:
            return never_stop
        if not all(isinstance(stop, str) and stop for stop in asked.stop_strings):
            raise BadRequest("stop_strings must be texts, none of them empty")
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        return stop_at_strings(asked.stop_strings, tokenizer)

    def _run(
        self, asked: GenerateArguments, prompts: PromptBatch, streamer: Any, ended: StopCheck, seed: int
    ) -> list[Run]:
        several = len(prompts.rows) * asked.samples > 1
        if several and asked.stop_strings and asked.pad_id is None:
            raise BadRequest("texts of a batch may end apart, and nothing says how to pad them: give pad_token_id")
        options = {
            "max_new_tokens": asked.new_tokens(prompts.length, self._client.client.target.max_positions),
            "temperature": asked.temperature,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "seed": seed,
            "stop_token_ids": asked.eos_ids,
            "ignore_eos": True,
        }
        if streamer is None:
            padded = [(ids.tolist(), row) for ids, row in zip(prompts.ids, prompts.rows, strict=True)]
            return self._client.run(generate_rows(self._client.client, padded, asked.samples, ended, **options))
        if several:
            raise BadRequest("a streamer tells one text: call generate once for each, or leave the streamer out")
        return [self._streamed(prompts, streamer, ended, options)]

    def _streamed(self, prompts: PromptBatch, streamer: Any, ended: StopCheck, options: Mapping[str, Any]) -> Run:
        run = self._client.client.stream(prompts.rows[0], **options)
        try:
            streamer.put(prompts.ids)
            for burst in self._client.iterate(stream_traversals(run, prompts.ids[0].tolist(), ended)):
                streamer.put(torch.tensor(burst))
        finally:
            # Whoever waits for the streamer in another thread must not wait for ever.
            streamer.end()
        return run


def _seed_of(asked: GenerateArguments, seed: int | None, generator: torch.Generator | None) -> int:
    """Raises BadRequest for two."""
    if seed is not None and generator is not None:
        raise BadRequest("both seed and generator are given: give one")
    if seed is not None or asked.temperature == 0:
        return 0 if seed is None else seed
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(SEEDS, (), generator=generator, device=device))


def _values_of(generation_config: Any) -> dict[str, Any]:
    """What it says.  Raises BadRequest for another kind of thing."""
    if isinstance(generation_config, Mapping):
        return dict(generation_config)
    if not isinstance(generation_config, GenerationConfig):
        raise BadRequest("generation_config is no transformers.GenerationConfig: give one, or single arguments")
    return dict(generation_config.to_dict())


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"transformers cannot read the config in '{folder}': {first_line}") from None


def _generation_config(folder: Path, config: Any) -> Any:
    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder / 'generation_config.json'} cannot be read ({error}): download it again") from None
