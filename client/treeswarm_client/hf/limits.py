"""Arguments of transformers' `generate` that a swarm cannot honour: values that change nothing, and what to do instead.

Nodes choose each token by rules, temperature, filters and seeded noise, and send back the tokens and their
log-probabilities.  What needs all logits, or changes them in another way, cannot be done from the client.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOCAL = "load the model with transformers' AutoModelForCausalLM for this"


@dataclass(frozen=True)
class Limit:
    """An argument of which only some values can be honoured."""

    instead: str
    """What the caller can do instead."""
    neutral: tuple[Any, ...] = (None,)
    """Values that change nothing; the first is the one to recommend.  Empty values never change anything."""
    sampling_only: bool = False
    """Whether the argument changes nothing under greedy decoding."""

    def allows(self, value: Any) -> bool:
        """Return whether this value changes nothing."""
        if value is None or (isinstance(value, Sequence | dict | set) and len(value) == 0):
            return True
        return isinstance(value, bool | int | float | str) and value in self.neutral


HONOURED = frozenset(
    {
        "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences",
        "pad_token_id", "bos_token_id", "eos_token_id", "stop_strings", "return_dict_in_generate", "output_scores",
        "stopping_criteria", "max_time", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
        "suppress_tokens", "min_length", "min_new_tokens", "min_p", "typical_p",
    }
)  # fmt: skip

INDIFFERENT = frozenset(
    {
        # These say how transformers computes, not what: the nodes compute in their own way.
        "use_cache", "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config", "low_memory",
        "prefill_chunk_size", "use_mtp",
        # These belong to beam search, assistants and encoder-decoder models, none of which a swarm has.
        "early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
        "assistant_ensemble_weight", "speculation_type", "is_assistant", "decoder_start_token_id",
        # Neither changes the choice: a node whose logits are not finite is dropped.
        "renormalize_logits", "remove_invalid_values",
        # These are bookkeeping of the config file.
        "transformers_version", "_from_model_config",
    }
)  # fmt: skip

_LOGITS = f"nodes do not change logits so: leave it out, or {LOCAL}"
_BEAMS = f"beam search needs all logits, nodes send tokens: use num_beams=1, or {LOCAL}"
_OUTPUTS = (
    f"nodes send tokens and their log-probabilities (return_dict_in_generate=True: `logprobs`), nothing else: {LOCAL}"
)
_DRAFT = "the swarm drafts by itself: name a draft in from_pretrained(draft=…)"
_TEXT = "give token ids, left-padded, with their attention_mask"

LIMITED: dict[str, Limit] = {
    "num_beams": Limit(_BEAMS, (1,)),
    "num_beam_groups": Limit(_BEAMS, (1,)),
    "diversity_penalty": Limit(_BEAMS, (0.0,)),
    "constraints": Limit(_BEAMS),
    "force_words_ids": Limit(_BEAMS),
    "penalty_alpha": Limit(_LOGITS, (0.0,)),
    "dola_layers": Limit(_LOGITS),
    "custom_generate": Limit(f"only greedy decoding and sampling run on a swarm: {LOCAL}"),
    "trust_remote_code": Limit("code from a model's repository is never run: leave it out", (False,)),
    "logits_processor": Limit(_LOGITS),
    "prefix_allowed_tokens_fn": Limit(_LOGITS),
    "encoder_repetition_penalty": Limit(_LOGITS, (1.0,)),
    "encoder_no_repeat_ngram_size": Limit(_LOGITS, (0,)),
    "begin_suppress_tokens": Limit(_LOGITS),
    "forced_bos_token_id": Limit(_LOGITS),
    "forced_eos_token_id": Limit(_LOGITS),
    "exponential_decay_length_penalty": Limit(_LOGITS),
    "guidance_scale": Limit(_LOGITS, (1.0,)),
    "negative_prompt_ids": Limit(_LOGITS),
    "negative_prompt_attention_mask": Limit(_LOGITS),
    "watermarking_config": Limit(_LOGITS),
    "top_h": Limit(f"sample with top_p or top_k, or {LOCAL}", sampling_only=True),
    "epsilon_cutoff": Limit(f"sample with top_p or top_k, or {LOCAL}", (0.0,), sampling_only=True),
    "eta_cutoff": Limit(f"sample with top_p or top_k, or {LOCAL}", (0.0,), sampling_only=True),
    "token_healing": Limit("cut the prompt's last token yourself", (False,)),
    "assistant_model": Limit(_DRAFT),
    "assistant_tokenizer": Limit(_DRAFT),
    "assistant_early_exit": Limit(_DRAFT),
    "prompt_lookup_num_tokens": Limit(f"{_DRAFT}; 'ngram' looks up earlier text", (None, 0)),
    "cache_implementation": Limit(
        "nodes keep KV caches unquantised: leave it out",
        ("dynamic", "dynamic_full", "static", "hybrid", "hybrid_chunked", "sliding_window", "offloaded",
         "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked", "paged"),
    ),
    "cache_config": Limit("nodes keep KV caches unquantised: leave it out"),
    "past_key_values": Limit("the nodes keep the KV cache: use model.inference_session()"),
    "logits_to_keep": Limit(_OUTPUTS),
    "output_logits": Limit(_OUTPUTS, (False,)),
    "output_attentions": Limit(_OUTPUTS, (False,)),
    "output_hidden_states": Limit(_OUTPUTS, (False,)),
    "inputs_embeds": Limit(_TEXT),
    "position_ids": Limit(_TEXT),
    "synced_gpus": Limit("nodes run independently: leave it out", (False,)),
}  # fmt: skip

LOADING: dict[str, Limit] = {
    "device_map": Limit("nodes choose their own devices: leave it out, or set the draft's with draft_device"),
    "max_memory": Limit("weights stay on the nodes: leave it out"),
    "offload_folder": Limit("weights stay on the nodes: leave it out"),
    "quantization_config": Limit("nodes hold their weights as they choose: ask for some with quantization='nf4'"),
    "load_in_8bit": Limit("ask for nodes with quantization='int8'", (False,)),
    "load_in_4bit": Limit("ask for nodes with quantization='nf4'", (False,)),
    "attn_implementation": Limit("nodes choose their own attention kernels: leave it out"),
    "low_cpu_mem_usage": Limit("weights stay on the nodes: leave it out", (False, True)),
    "use_safetensors": Limit("the client reads no weights, and nodes read safetensors only: leave it out", (True,)),
    "trust_remote_code": Limit("code from a model's repository is never run: leave it out", (False,)),
    "config": Limit("the config is that of the nodes: give the name of their model"),
    "state_dict": Limit("weights stay on the nodes: leave it out"),
    "subfolder": Limit("give a directory, or a repository with the model at its top level", ("",)),
    "force_download": Limit("delete the model from the hub's cache instead", (False,)),
    "proxies": Limit("set the environment variable HTTPS_PROXY"),
    "output_loading_info": Limit("the client loads no weights: leave it out", (False,)),
}
"""Arguments of transformers' `from_pretrained` that ours does not have."""
