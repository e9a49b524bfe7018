"""`AutoSwarmModelForCausalLM`: the interface of transformers' `generate`, computed by a swarm."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from treeswarm.errors import BadRequest, ModelError
from treeswarm.keys import read_swarm_key
from treeswarm.model_files import HubOptions
from treeswarm_client.chain.shared_prompt import PrefixScope
from treeswarm_client.client_settings import DEFAULT_PATIENCE_S
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.hf.arguments import GenerateArguments, StopArguments, check_loading, read_arguments
from treeswarm_client.hf.decoding import (
    StopCheck,
    any_of,
    generate_rows,
    never_stop,
    stop_after,
    stop_at_strings,
    stop_by_criteria,
    stream_traversals,
)
from treeswarm_client.hf.inference_session import InferenceSession
from treeswarm_client.hf.output import SwarmGenerateOutput, TransitionScores
from treeswarm_client.hf.prompts import PromptBatch, check_token_types, join_continuations, make_batch, unpack_inputs
from treeswarm_client.sync import SyncSwarmClient

# Number of seeds that torch can draw from a generator in one call.
SEEDS = 2**63 - 1


def _is_no_complaint(record: logging.LogRecord) -> bool:
    """Return whether a line of a pipeline's log is another than that it does not know this class: it works with it."""
    return f"'{AutoSwarmModelForCausalLM.__name__}' is not supported" not in record.getMessage()


logging.getLogger("transformers.pipelines.base").addFilter(_is_no_complaint)


class AutoSwarmModelForCausalLM:
    """A causal language model whose layers are on a swarm's nodes; `generate` is that of transformers.

        with AutoSwarmModelForCausalLM.from_pretrained("org/model", registry="host:4001") as model:
            print(tokenizer.batch_decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)))

    Greedy texts are those of transformers.  Sampled texts follow the same distribution, and the same seed repeats them.
    Any number of threads may generate at once.  What a swarm cannot honour is refused with BadRequest.
    """

    def __init__(self, client: SyncSwarmClient) -> None:
        """Make a model over a client that is open; `from_pretrained` makes both."""
        self._client = client
        folder = client.client.folder
        self.name_or_path = client.client.model
        self.config = _config(folder)
        """The config of this model, as transformers reads it."""
        self.generation_config = _generation_config(folder, self.config)
        """Settings that `generate` takes where its arguments say nothing."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        registry: str | None = None,
        peers: str | None = None,
        draft: str = "auto",
        draft_device: str = "auto",
        swarm_key: bytes | str | Path | None = None,
        prefix_scope: PrefixScope = "client",
        tree_size: TreeSize = "auto",
        patience: float = DEFAULT_PATIENCE_S,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        emulate_link: str | None = None,
        drive: str = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Find the nodes that serve a model, given as `SwarmClient` takes it, and return the model.

        `registry` or `peers` say where the nodes are.  `swarm_key` is a private swarm's key, or the file that holds it.
        The other swarm options are those of `SwarmClient`.  `revision`, `cache_dir`, `token` and `local_files_only`
        are those of `huggingface_hub`, whose environment variables count too.  Only config and tokenizer are read, and
        the draft model.  Raises what entering a `SwarmClient` raises.
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
            drive=drive,
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
        """The device for token ids; ids on another device are accepted too, and the result is returned there."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the nodes compute."""
        return getattr(torch, self._client.client.target.numerics.dtype)  # type: ignore[no-any-return]

    @property
    def folder(self) -> Path:
        """Directory with config and tokenizer of the revision in use: `AutoTokenizer.from_pretrained(model.folder)`."""
        return self._client.client.folder

    @property
    def client(self) -> SyncSwarmClient:
        """The client below this model, for `overview`, streams of text and everything else."""
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
        """Continue every row of a batch.

        Returns int64 [rows × num_return_sequences, length], prompts included, padded on the right; or a
        SwarmGenerateOutput with `return_dict_in_generate`.

        `inputs` is [rows, tokens], padded on the left, or a tokenizer's whole output.  Options, defaults and their
        order are those of transformers.  `seed` fixes what is sampled; without it, a seed is drawn from `generator`, or
        from torch's global generator.  `streamer` receives the prompt, then the tokens of each traversal, in the
        calling thread.  Raises BadRequest for what cannot be honoured, and while generating NodeLost, Refused and the
        other SwarmErrors.
        """
        check_token_types(token_type_ids)
        arguments = self._read_arguments(generation_config, options)
        prompts = make_batch(*unpack_inputs(inputs, input_ids, attention_mask), arguments.special)
        stops_here = self._make_stop_check(arguments.stops, tokenizer)
        runs = self._run(arguments, prompts, streamer, stops_here, _choose_seed(arguments, seed, generator))
        sequences = join_continuations(
            prompts, [run.token_ids for run in runs], samples=arguments.samples, pad_id=arguments.special.pad_id
        )
        if not arguments.as_output:
            return sequences
        logprobs = tuple(tuple(run.logprobs) for run in runs)
        are_processed = arguments.sampling.changes_scores or not arguments.rules.for_prompt(prompts.length).neutral
        scores = TransitionScores(logprobs, are_processed) if arguments.with_scores else None
        return SwarmGenerateOutput(sequences=sequences, logprobs=logprobs, scores=scores, runs=tuple(runs))

    def compute_transition_scores(
        self, sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> torch.Tensor:
        """Return the log-probability of each new token, float32 [rows × samples, new tokens].

        `scores` are those of `generate(…, return_dict_in_generate=True, output_scores=True)`.  Raises BadRequest where
        transformers' result would be another one: without `normalize_logits`, and after filters.
        """
        if not isinstance(scores, TransitionScores) or beam_indices is not None:
            raise BadRequest(
                "compute_transition_scores() takes the `scores` that this model's generate() returns with "
                "output_scores=True, and no beam_indices"
            )
        if not normalize_logits:
            raise BadRequest("nodes send log-probabilities, no logits: give normalize_logits=True")
        if scores.are_processed:
            raise BadRequest(
                "transformers' scores are those after penalties, temperature and filters, which nodes do not send: "
                "generate without penalties, with do_sample=False or with temperature=1.0, top_k=0 and top_p=1.0"
            )
        return scores.as_tensor()

    def can_generate(self) -> bool:
        """Return True: this is what the model is for."""
        return True

    def inference_session(self) -> InferenceSession:
        """Return a text that several calls of `generate` continue; the nodes keep its KV cache between the calls.

        Raises BadRequest if this client shares no prefixes.
        """
        return InferenceSession(self.generate, self._client.client.sessions.prefix_scope)

    def close(self) -> None:
        """Close the sessions on the nodes; generations under way end with BadRequest."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        client = self._client.client
        peers, registry = client.nodes.peers, client.nodes.registry
        where = f"peers={peers!r}" if registry is None else f"registry={registry!r}"
        nodes, numerics = len(client.view.snapshot), client.target.numerics
        bits = "" if numerics.quantization == "none" else f" in {numerics.quantization}"
        return (
            f"{type(self).__name__}({self.name_or_path!r}, {where}: {self.config.model_type}, "
            f"{client.target.blocks} blocks on {nodes} node{'s' * (nodes != 1)}, {numerics.dtype}{bits})"
        )

    def _read_arguments(self, generation_config: Any, options: Mapping[str, Any]) -> GenerateArguments:
        passed = {} if generation_config is None else _values_of(generation_config)
        where = f"the generation_config.json of '{self.name_or_path}'"
        return read_arguments(options, passed, _values_of(self.generation_config), where)

    def _make_stop_check(self, stops: StopArguments, tokenizer: Any) -> StopCheck:
        checks = []
        if stops.strings:
            if not all(isinstance(stop, str) and stop for stop in stops.strings):
                raise BadRequest(f"stop_strings is {list(stops.strings)!r}: give strings, none of them empty")
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            checks.append(stop_at_strings(stops.strings, tokenizer))
        if stops.criteria:
            checks.append(stop_by_criteria(stops.criteria))
        if stops.max_time is not None:
            checks.append(stop_after(stops.max_time))
        return any_of(checks) if checks else never_stop

    def _run(
        self, arguments: GenerateArguments, prompts: PromptBatch, streamer: Any, stops_here: StopCheck, seed: int
    ) -> list[Run]:
        several = len(prompts.rows) * arguments.samples > 1
        if several and arguments.stops and arguments.special.pad_id is None:
            raise BadRequest(
                "the texts of this batch may end at different lengths, and there is no pad token: give pad_token_id"
            )
        client = self._client.client
        options = {
            "max_new_tokens": arguments.lengths.new_tokens(prompts.length, client.target.max_positions),
            "temperature": arguments.sampling.temperature,
            "top_k": arguments.sampling.top_k,
            "top_p": arguments.sampling.top_p,
            "seed": seed,
            "stop_token_ids": arguments.special.eos_ids,
            "ignore_eos": True,
            "rules": arguments.rules.for_prompt(prompts.length),
        }
        if streamer is None:
            pairs = [(ids.tolist(), row) for ids, row in zip(prompts.ids, prompts.rows, strict=True)]
            return self._client.run(generate_rows(client, pairs, arguments.samples, stops_here, **options))
        if several:
            raise BadRequest(
                "a streamer takes one text, and this call has several: call generate once for each, or leave the "
                "streamer out"
            )
        return [self._run_streamed(prompts, streamer, stops_here, options)]

    def _run_streamed(
        self, prompts: PromptBatch, streamer: Any, stops_here: StopCheck, options: Mapping[str, Any]
    ) -> Run:
        run = self._client.client.stream(prompts.rows[0], **options)
        try:
            streamer.put(prompts.ids)
            for burst in self._client.iterate(stream_traversals(run, prompts.ids[0].tolist(), stops_here)):
                streamer.put(torch.tensor(burst))
        finally:
            # Another thread that reads from the streamer must not wait forever.
            streamer.end()
        return run


def _choose_seed(arguments: GenerateArguments, seed: int | None, generator: torch.Generator | None) -> int:
    """Return the given seed, or draw one if the call samples.  Raises BadRequest if both sources are given."""
    if seed is not None and generator is not None:
        raise BadRequest("both seed and generator are given: give one")
    if seed is not None or arguments.sampling.temperature == 0:
        return 0 if seed is None else seed
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(SEEDS, (), generator=generator, device=device))


def _values_of(generation_config: Any) -> dict[str, Any]:
    """Return the values of a generation config.  Raises BadRequest for an object of another kind."""
    if isinstance(generation_config, Mapping):
        return dict(generation_config)
    if not isinstance(generation_config, GenerationConfig):
        raise BadRequest(
            f"generation_config is a {type(generation_config).__name__}: give a transformers.GenerationConfig, or "
            "single arguments"
        )
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
