"""What a call of `generate` comes to: its arguments over the given generation config over the model's own."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from treeswarm.errors import BadRequest
from treeswarm_client.hf.limits import HONOURED, INDIFFERENT, LIMITED, LOADING, Limit

# transformers' own where nothing says otherwise.
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50


@dataclass(frozen=True)
class GenerateArguments:
    """One call's settings, all honoured."""

    max_new_tokens: int | None
    max_length: int | None
    """Prompt and its padding included; `max_new_tokens` goes before it; where both are None, transformers' default."""
    temperature: float
    """0 without sampling."""
    top_k: int
    top_p: float
    samples: int
    """Of each row."""
    eos_ids: tuple[int, ...]
    pad_id: int | None
    """As said, or the first end token."""
    bos_id: int | None
    stop_strings: tuple[str, ...]
    as_output: bool
    """An output object instead of ids."""

    def new_tokens(self, prompt_length: int, max_positions: int) -> int:
        """How many to generate after prompts padded to `prompt_length`.  Raises BadRequest where none fit."""
        if self.max_new_tokens is not None:
            most = self.max_new_tokens
        elif self.max_length is not None:
            most = self.max_length - prompt_length
        else:
            most = min(DEFAULT_NEW_TOKENS, max_positions - prompt_length)
        if most < 1:
            raise BadRequest(
                f"nothing may be generated: the prompt has {prompt_length} tokens, padding included, max_length is "
                f"{self.max_length}, max_new_tokens {self.max_new_tokens}: raise max_new_tokens"
            )
        return most


@dataclass(frozen=True)
class _Layers:
    """Three layers; an argument that is None switches off what the lower ones say, elsewhere None says nothing."""

    given: Mapping[str, Any]
    passed: Mapping[str, Any]
    own: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.given:
            return self.given[name]
        found = self.passed.get(name)
        found = self.own.get(name) if found is None else found
        return default if found is None else found


def read_arguments(
    given: Mapping[str, Any], passed: Mapping[str, Any], own: Mapping[str, Any], where: str
) -> GenerateArguments:
    """`given` are the arguments, `passed` the values of a `generation_config` argument, `own` those of the model's own,
    which `where` names.  Raises BadRequest for what cannot be honoured."""
    layers = _Layers(given, passed, own)
    sampling = bool(layers.get("do_sample", False))
    _refuse_unknown(given, passed)
    refuse_limited(given, _as_argument)
    refuse_limited(passed, _as_config)
    lower = {name: value for name, value in own.items() if name not in given and passed.get(name) is None}
    still = {name: value for name, value in lower.items() if sampling or not _for_sampling_only(name)}
    refuse_limited(still, lambda name, value, limit: _as_file(name, value, limit, where))
    if not sampling:
        _check_greedy(given)
    eos_ids = ids_of("eos_token_id", layers.get("eos_token_id"))
    pad_ids = ids_of("pad_token_id", layers.get("pad_token_id")) or eos_ids
    bos_ids = ids_of("bos_token_id", layers.get("bos_token_id"))
    stops = layers.get("stop_strings") or ()
    return GenerateArguments(
        max_new_tokens=_whole("max_new_tokens", layers.get("max_new_tokens")),
        max_length=_whole("max_length", layers.get("max_length")),
        temperature=_temperature(layers.get("temperature", 1.0)) if sampling else 0.0,
        top_k=(_whole("top_k", layers.get("top_k", DEFAULT_TOP_K)) or 0) if sampling else 0,
        top_p=_number("top_p", layers.get("top_p", 1.0), 1.0) if sampling else 1.0,
        samples=_samples(_whole("num_return_sequences", layers.get("num_return_sequences")), sampling),
        eos_ids=eos_ids,
        pad_id=pad_ids[0] if pad_ids else None,
        bos_id=bos_ids[0] if bos_ids else None,
        stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
        as_output=bool(layers.get("return_dict_in_generate", False)),
    )


def check_loading(options: Mapping[str, Any]) -> None:
    """What `from_pretrained` was given beyond its own arguments.  Raises BadRequest."""
    for name, value in options.items():
        if name not in LOADING:
            raise BadRequest(f"from_pretrained() has no argument '{name}'")
        if not LOADING[name].allows(value):
            raise BadRequest(
                f"from_pretrained({name}={_shown(value)}) is nothing a swarm can honour: {LOADING[name].instead}"
            )


def refuse_limited(values: Mapping[str, Any], refuse: Callable[[str, Any, Limit], NoReturn]) -> None:
    """Call `refuse` for the first value that changes something and cannot be honoured."""
    for name, value in values.items():
        if name in LIMITED and not LIMITED[name].allows(value):
            refuse(name, value, LIMITED[name])


def ids_of(name: str, value: Any) -> tuple[int, ...]:
    """Token ids given as a number, a list or a tensor.  Raises BadRequest."""
    value = value.tolist() if hasattr(value, "tolist") else value
    found = () if value is None else tuple(value) if isinstance(value, list | tuple | set) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
        raise BadRequest(f"{name} is {_shown(value)}: give a token id, or a list of them")
    return tuple(token for token in found if token >= 0)


def _refuse_unknown(given: Mapping[str, Any], passed: Mapping[str, Any]) -> None:
    known = HONOURED | INDIFFERENT | LIMITED.keys()
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean '{close[0]}'?" if close else ""
            raise BadRequest(f"generate() has no argument '{name}'{hint}")
    for name, value in passed.items():
        if name not in known and value is not None:
            raise BadRequest(f"generation_config has '{name}', which is nothing that generate() knows: take it out")


def _for_sampling_only(name: str) -> bool:
    return name in LIMITED and LIMITED[name].sampling_only


def _as_argument(name: str, value: Any, limit: Limit) -> NoReturn:
    raise BadRequest(f"generate({name}={_shown(value)}) is nothing a swarm can honour: {limit.instead}")


def _as_config(name: str, value: Any, limit: Limit) -> NoReturn:
    raise BadRequest(f"generation_config says {name}={_shown(value)}, nothing a swarm can honour: {limit.instead}")


def _as_file(name: str, value: Any, limit: Limit, where: str) -> NoReturn:
    raise BadRequest(
        f"{where} says {name}={_shown(value)}, nothing a swarm can honour: to generate without it, which gives other "
        f"texts, call generate({name}={limit.neutral[0]!r}); {limit.instead}"
    )


def _check_greedy(given: Mapping[str, Any]) -> None:
    """Sampling arguments would be ignored where nobody spoke of sampling; do_sample=False says that it is meant."""
    for name, off in (("temperature", (0, 1)), ("top_p", (1,)), ("top_k", (0, DEFAULT_TOP_K))):
        if given.get(name) is not None and given[name] not in off and "do_sample" not in given:
            raise BadRequest(
                f"generate({name}={_shown(given[name])}) changes nothing without sampling: add do_sample=True"
            )


def _temperature(value: Any) -> float:
    found = _number("temperature", value, 1.0)
    if found <= 0:
        raise BadRequest(f"temperature {found} with do_sample=True: give more than 0, or do_sample=False for greedy")
    return found


def _samples(asked: int | None, sampling: bool) -> int:
    count = 1 if asked is None else asked
    if count < 1:
        raise BadRequest(f"num_return_sequences is {count}: ask for at least 1")
    if count > 1 and not sampling:
        raise BadRequest(f"num_return_sequences={count} would give one greedy text {count} times: add do_sample=True")
    return count


def _whole(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name} is {_shown(value)}: give a whole number")
    return value


def _number(name: str, value: Any, off: float) -> float:
    if value is None:
        return off
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BadRequest(f"{name} is {_shown(value)}: give a number") from None


def _shown(value: Any) -> str:
    """Short, for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{type(value).__name__}(…)"
