"""The arguments of a `generate` call, laid over the given generation config and over the model's own."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from treeswarm.errors import BadRequest
from treeswarm_client.hf.limits import HONOURED, INDIFFERENT, LIMITED, LOADING, Limit
from treeswarm_client.hf.rules import RuleArguments, read_rules

# transformers' defaults where neither the arguments nor a config give a value.
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50


@dataclass(frozen=True)
class LengthLimits:
    """How long the texts may become."""

    max_new_tokens: int | None
    """Number of new tokens, or None.  It takes precedence over `max_length`."""
    max_length: int | None
    """Number of tokens with the prompt and its padding, or None.  Where both are None, transformers' default holds."""

    def new_tokens(self, prompt_length: int, max_positions: int) -> int:
        """Return how many tokens to generate after prompts padded to `prompt_length`.

        Raises BadRequest if that is less than one.
        """
        if self.max_new_tokens is not None:
            count = self.max_new_tokens
        elif self.max_length is not None:
            count = self.max_length - prompt_length
        else:
            count = min(DEFAULT_NEW_TOKENS, max_positions - prompt_length)
        if count < 1:
            raise BadRequest(
                f"there is no room for a new token: the prompt has {prompt_length} tokens with its padding, max_length "
                f"is {self.max_length}, max_new_tokens {self.max_new_tokens}: raise max_new_tokens"
            )
        return count


@dataclass(frozen=True)
class SamplingArguments:
    """How each token is chosen."""

    temperature: float
    """Sampling temperature; 0 for greedy decoding."""
    top_k: int
    """Number of most likely tokens to choose from; 0 for all."""
    top_p: float
    """Probability mass of the most likely tokens to choose from; 1.0 for all."""

    @property
    def changes_scores(self) -> bool:
        """Whether transformers' scores, which come after temperature and filters, are not those of the model itself."""
        return self.temperature not in (0.0, 1.0) or self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning of their own."""

    eos_ids: tuple[int, ...]
    """Token ids that end a text."""
    pad_id: int | None
    """Id of the pad token: the one given, else the first end token, or None if there is neither."""
    bos_id: int | None
    """Id of the begin token, or None if the model has none."""


@dataclass(frozen=True)
class StopArguments:
    """What ends a text besides end tokens and its length."""

    strings: tuple[str, ...] = ()
    """Strings that end a text as soon as it contains one of them."""
    criteria: tuple[Callable[..., Any], ...] = ()
    """transformers' stopping criteria, which are called with one row and without scores."""
    max_time: float | None = None
    """Seconds after which texts end with the token that they have, or None."""

    def __bool__(self) -> bool:
        return bool(self.strings or self.criteria or self.max_time is not None)


@dataclass(frozen=True)
class GenerateArguments:
    """The settings of one `generate` call, all of which a swarm honours."""

    lengths: LengthLimits
    sampling: SamplingArguments
    samples: int
    """Number of samples of each row."""
    special: SpecialTokens
    rules: RuleArguments
    """What is done to logits before a token is chosen."""
    stops: StopArguments
    as_output: bool
    """Whether to return an output object instead of token ids."""
    with_scores: bool
    """Whether that has the scores that `compute_transition_scores` takes."""


@dataclass(frozen=True)
class _Layers:
    """Three layers of settings.

    None as an argument switches off what the lower layers set; elsewhere None means that nothing is set.
    """

    given: Mapping[str, Any]
    passed: Mapping[str, Any]
    own: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        if name in self.given:
            return self.given[name]
        value = self.passed.get(name)
        value = self.own.get(name) if value is None else value
        return default if value is None else value


def read_arguments(
    given: Mapping[str, Any], passed: Mapping[str, Any], own: Mapping[str, Any], where: str
) -> GenerateArguments:
    """Return the settings of one call.

    `given` are the call's arguments, `passed` the values of its `generation_config` argument, and `own` those of the
    model's own generation config, which `where` names.  Raises BadRequest for what cannot be honoured.
    """
    layers = _Layers(given, passed, own)
    sampling = bool(layers.get("do_sample", False))
    _refuse_unknown(given, passed)
    refuse_limited(given, _refuse_argument)
    refuse_limited(passed, _refuse_config_value)
    lower = {name: value for name, value in own.items() if name not in given and passed.get(name) is None}
    effective = {name: value for name, value in lower.items() if sampling or not _is_for_sampling_only(name)}
    refuse_limited(effective, lambda name, value, limit: _refuse_model_value(name, value, limit, where))
    if not sampling:
        _check_greedy(given)
    special = _read_special_tokens(layers)
    samples = _whole_number("num_return_sequences", layers.get("num_return_sequences"))
    return GenerateArguments(
        lengths=LengthLimits(
            max_new_tokens=_whole_number("max_new_tokens", layers.get("max_new_tokens")),
            max_length=_whole_number("max_length", layers.get("max_length")),
        ),
        sampling=_read_sampling(layers) if sampling else SamplingArguments(temperature=0.0, top_k=0, top_p=1.0),
        samples=_check_samples(samples, sampling=sampling),
        special=special,
        rules=read_rules(layers.get, special.eos_ids, sampling=sampling),
        stops=_read_stops(layers),
        as_output=bool(layers.get("return_dict_in_generate", False)),
        with_scores=bool(layers.get("output_scores", False)),
    )


def check_loading(options: Mapping[str, Any]) -> None:
    """Check what `from_pretrained` was given beyond its own arguments.  Raises BadRequest."""
    for name, value in options.items():
        if name not in LOADING:
            raise BadRequest(f"from_pretrained() has no argument '{name}': leave it out")
        if not LOADING[name].allows(value):
            raise BadRequest(
                f"a swarm cannot honour from_pretrained({name}={_abbreviate(value)}): {LOADING[name].instead}"
            )


def refuse_limited(values: Mapping[str, Any], refuse: Callable[[str, Any, Limit], NoReturn]) -> None:
    """Call `refuse` for the first value that would change the text and cannot be honoured."""
    for name, value in values.items():
        if name in LIMITED and not LIMITED[name].allows(value):
            refuse(name, value, LIMITED[name])


def ids_of(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids that were given as a number, a list or a tensor.  Raises BadRequest."""
    value = value.tolist() if hasattr(value, "tolist") else value
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple | set) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BadRequest(f"{name} is {_abbreviate(value)}: give a token id, or a list of them")
    return tuple(token for token in ids if token >= 0)


def _read_sampling(layers: _Layers) -> SamplingArguments:
    return SamplingArguments(
        temperature=_check_temperature(layers.get("temperature", 1.0)),
        top_k=_whole_number("top_k", layers.get("top_k", DEFAULT_TOP_K)) or 0,
        top_p=_number("top_p", layers.get("top_p", 1.0), 1.0),
    )


def _read_stops(layers: _Layers) -> StopArguments:
    strings, criteria = layers.get("stop_strings") or (), layers.get("stopping_criteria") or ()
    criteria = (criteria,) if callable(criteria) and not isinstance(criteria, Sequence) else tuple(criteria)
    if not all(map(callable, criteria)):
        raise BadRequest(f"stopping_criteria is {_abbreviate(criteria)}: give transformers' StoppingCriteriaList")
    max_time = layers.get("max_time")
    return StopArguments(
        strings=(strings,) if isinstance(strings, str) else tuple(strings),
        criteria=criteria,
        max_time=None if max_time is None else _number("max_time", max_time, 0.0),
    )


def _read_special_tokens(layers: _Layers) -> SpecialTokens:
    eos_ids = ids_of("eos_token_id", layers.get("eos_token_id"))
    pad_ids = ids_of("pad_token_id", layers.get("pad_token_id")) or eos_ids
    bos_ids = ids_of("bos_token_id", layers.get("bos_token_id"))
    return SpecialTokens(eos_ids, pad_ids[0] if pad_ids else None, bos_ids[0] if bos_ids else None)


def _refuse_unknown(given: Mapping[str, Any], passed: Mapping[str, Any]) -> None:
    names = HONOURED | INDIFFERENT | LIMITED.keys()
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f": did you mean '{close[0]}'?" if close else ""
            raise BadRequest(f"generate() has no argument '{name}'{hint}")
    for name, value in passed.items():
        if name not in names and value is not None:
            raise BadRequest(f"generation_config has '{name}', which generate() does not know: remove it")


def _is_for_sampling_only(name: str) -> bool:
    return name in LIMITED and LIMITED[name].sampling_only


def _refuse_argument(name: str, value: Any, limit: Limit) -> NoReturn:
    raise BadRequest(f"a swarm cannot honour generate({name}={_abbreviate(value)}): {limit.instead}")


def _refuse_config_value(name: str, value: Any, limit: Limit) -> NoReturn:
    raise BadRequest(
        f"generation_config says {name}={_abbreviate(value)}, which a swarm cannot honour: {limit.instead}"
    )


def _refuse_model_value(name: str, value: Any, limit: Limit, where: str) -> NoReturn:
    raise BadRequest(
        f"{where} says {name}={_abbreviate(value)}, which a swarm cannot honour: call generate("
        f"{name}={limit.neutral[0]!r}) to generate without it, which gives other texts; {limit.instead}"
    )


def _check_greedy(given: Mapping[str, Any]) -> None:
    """Refuse sampling arguments that greedy decoding would ignore, unless `do_sample=False` says that this is meant."""
    for name, off in (
        ("temperature", (0, 1)),
        ("top_p", (1,)),
        ("top_k", (0, DEFAULT_TOP_K)),
        ("min_p", (0,)),
        ("typical_p", (1,)),
    ):
        if given.get(name) is not None and given[name] not in off and "do_sample" not in given:
            raise BadRequest(
                f"generate({name}={_abbreviate(given[name])}) changes nothing without sampling: add do_sample=True"
            )


def _check_temperature(value: Any) -> float:
    temperature = _number("temperature", value, 1.0)
    if temperature <= 0:
        raise BadRequest(
            f"temperature is {temperature} with do_sample=True: give more than 0, or do_sample=False for greedy"
        )
    return temperature


def _check_samples(number: int | None, *, sampling: bool) -> int:
    samples = 1 if number is None else number
    if samples < 1:
        raise BadRequest(f"num_return_sequences is {samples}: ask for at least 1")
    if samples > 1 and not sampling:
        raise BadRequest(
            f"num_return_sequences={samples} would give one greedy text {samples} times: add do_sample=True"
        )
    return samples


def _whole_number(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{name} is {_abbreviate(value)}: give a whole number")
    return value


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BadRequest(f"{name} is {_abbreviate(value)}: give a number") from None


def _abbreviate(value: Any) -> str:
    """Return a short form of a value for an error message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{type(value).__name__}(…)"
