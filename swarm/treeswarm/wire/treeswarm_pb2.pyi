from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Answers(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Answers]
    LAST: _ClassVar[Answers]
    ALL: _ClassVar[Answers]
NONE: Answers
LAST: Answers
ALL: Answers

class ControlUp(_message.Message):
    __slots__ = ("describe", "open", "hint", "ping", "close", "resume", "watch", "dial_back", "manage", "lease_port", "report_lost", "find_swarm", "drive")
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    WATCH_FIELD_NUMBER: _ClassVar[int]
    DIAL_BACK_FIELD_NUMBER: _ClassVar[int]
    MANAGE_FIELD_NUMBER: _ClassVar[int]
    LEASE_PORT_FIELD_NUMBER: _ClassVar[int]
    REPORT_LOST_FIELD_NUMBER: _ClassVar[int]
    FIND_SWARM_FIELD_NUMBER: _ClassVar[int]
    DRIVE_FIELD_NUMBER: _ClassVar[int]
    describe: Describe
    open: Open
    hint: Hint
    ping: Ping
    close: Close
    resume: Resume
    watch: Watch
    dial_back: DialBack
    manage: Manage
    lease_port: LeasePort
    report_lost: ReportLost
    find_swarm: FindSwarm
    drive: Drive
    def __init__(self, describe: _Optional[_Union[Describe, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., watch: _Optional[_Union[Watch, _Mapping]] = ..., dial_back: _Optional[_Union[DialBack, _Mapping]] = ..., manage: _Optional[_Union[Manage, _Mapping]] = ..., lease_port: _Optional[_Union[LeasePort, _Mapping]] = ..., report_lost: _Optional[_Union[ReportLost, _Mapping]] = ..., find_swarm: _Optional[_Union[FindSwarm, _Mapping]] = ..., drive: _Optional[_Union[Drive, _Mapping]] = ...) -> None: ...

class ControlDown(_message.Message):
    __slots__ = ("description", "opened", "answer", "pong", "fault", "records", "dialled_back", "managed", "port_leased", "incoming_connection", "swarm_found", "driven_tokens", "proposal")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    DIALLED_BACK_FIELD_NUMBER: _ClassVar[int]
    MANAGED_FIELD_NUMBER: _ClassVar[int]
    PORT_LEASED_FIELD_NUMBER: _ClassVar[int]
    INCOMING_CONNECTION_FIELD_NUMBER: _ClassVar[int]
    SWARM_FOUND_FIELD_NUMBER: _ClassVar[int]
    DRIVEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    description: Description
    opened: Opened
    answer: Answer
    pong: Pong
    fault: Fault
    records: Records
    dialled_back: DialledBack
    managed: Managed
    port_leased: PortLeased
    incoming_connection: IncomingConnection
    swarm_found: SwarmFound
    driven_tokens: DrivenTokens
    proposal: Proposal
    def __init__(self, description: _Optional[_Union[Description, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., records: _Optional[_Union[Records, _Mapping]] = ..., dialled_back: _Optional[_Union[DialledBack, _Mapping]] = ..., managed: _Optional[_Union[Managed, _Mapping]] = ..., port_leased: _Optional[_Union[PortLeased, _Mapping]] = ..., incoming_connection: _Optional[_Union[IncomingConnection, _Mapping]] = ..., swarm_found: _Optional[_Union[SwarmFound, _Mapping]] = ..., driven_tokens: _Optional[_Union[DrivenTokens, _Mapping]] = ..., proposal: _Optional[_Union[Proposal, _Mapping]] = ...) -> None: ...

class LinkUp(_message.Message):
    __slots__ = ("hello", "append")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    APPEND_FIELD_NUMBER: _ClassVar[int]
    hello: LinkHello
    append: Append
    def __init__(self, hello: _Optional[_Union[LinkHello, _Mapping]] = ..., append: _Optional[_Union[Append, _Mapping]] = ...) -> None: ...

class LinkDown(_message.Message):
    __slots__ = ("welcome",)
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    welcome: LinkWelcome
    def __init__(self, welcome: _Optional[_Union[LinkWelcome, _Mapping]] = ...) -> None: ...

class NumericsClass(_message.Message):
    __slots__ = ("weights", "dtype", "quantization", "activations")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    weights: str
    dtype: str
    quantization: str
    activations: str
    def __init__(self, weights: _Optional[str] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., activations: _Optional[str] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Describe(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("version", "software", "span", "blocks", "vocab_size", "hidden_size", "max_positions", "config", "numerics", "attention", "trunk_free", "frames", "forwards", "forward_sessions", "sessions", "opened", "resumed", "refused", "prefix_hits", "prefix_tokens", "skipped_rows", "shared_pages")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_FREE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_ROWS_FIELD_NUMBER: _ClassVar[int]
    SHARED_PAGES_FIELD_NUMBER: _ClassVar[int]
    version: int
    software: str
    span: Span
    blocks: int
    vocab_size: int
    hidden_size: int
    max_positions: int
    config: str
    numerics: NumericsClass
    attention: str
    trunk_free: int
    frames: int
    forwards: int
    forward_sessions: int
    sessions: int
    opened: int
    resumed: int
    refused: int
    prefix_hits: int
    prefix_tokens: int
    skipped_rows: int
    shared_pages: int
    def __init__(self, version: _Optional[int] = ..., software: _Optional[str] = ..., span: _Optional[_Union[Span, _Mapping]] = ..., blocks: _Optional[int] = ..., vocab_size: _Optional[int] = ..., hidden_size: _Optional[int] = ..., max_positions: _Optional[int] = ..., config: _Optional[str] = ..., numerics: _Optional[_Union[NumericsClass, _Mapping]] = ..., attention: _Optional[str] = ..., trunk_free: _Optional[int] = ..., frames: _Optional[int] = ..., forwards: _Optional[int] = ..., forward_sessions: _Optional[int] = ..., sessions: _Optional[int] = ..., opened: _Optional[int] = ..., resumed: _Optional[int] = ..., refused: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., prefix_tokens: _Optional[int] = ..., skipped_rows: _Optional[int] = ..., shared_pages: _Optional[int] = ...) -> None: ...

class NextHop(_message.Message):
    __slots__ = ("address", "ticket")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    address: str
    ticket: bytes
    def __init__(self, address: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("version", "session", "epoch", "span", "numerics", "trunk_room", "crown_room", "ticket", "next_hop", "resumption", "forwards_replay", "alternatives", "prefix_scope", "prefix_digests", "proposal_nodes", "taps", "rules", "alternative_logprobs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    TRUNK_ROOM_FIELD_NUMBER: _ClassVar[int]
    CROWN_ROOM_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NEXT_HOP_FIELD_NUMBER: _ClassVar[int]
    RESUMPTION_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_REPLAY_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SCOPE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_NODES_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    version: int
    session: bytes
    epoch: int
    span: Span
    numerics: NumericsClass
    trunk_room: int
    crown_room: int
    ticket: bytes
    next_hop: NextHop
    resumption: Resumption
    forwards_replay: bool
    alternatives: int
    prefix_scope: bytes
    prefix_digests: bytes
    proposal_nodes: int
    taps: TapRequest
    rules: RulesRequest
    alternative_logprobs: bool
    def __init__(self, version: _Optional[int] = ..., session: _Optional[bytes] = ..., epoch: _Optional[int] = ..., span: _Optional[_Union[Span, _Mapping]] = ..., numerics: _Optional[_Union[NumericsClass, _Mapping]] = ..., trunk_room: _Optional[int] = ..., crown_room: _Optional[int] = ..., ticket: _Optional[bytes] = ..., next_hop: _Optional[_Union[NextHop, _Mapping]] = ..., resumption: _Optional[_Union[Resumption, _Mapping]] = ..., forwards_replay: bool = ..., alternatives: _Optional[int] = ..., prefix_scope: _Optional[bytes] = ..., prefix_digests: _Optional[bytes] = ..., proposal_nodes: _Optional[int] = ..., taps: _Optional[_Union[TapRequest, _Mapping]] = ..., rules: _Optional[_Union[RulesRequest, _Mapping]] = ..., alternative_logprobs: bool = ...) -> None: ...

class RulesRequest(_message.Message):
    __slots__ = ("prompt_length", "repetition_penalty", "presence_penalty", "frequency_penalty", "bias_tokens", "biases", "min_p", "typical_p", "no_repeat_ngram_size", "bad_word_lengths", "bad_word_tokens", "min_tokens", "end_tokens", "grammar_kind", "grammar")
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    NO_REPEAT_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    BAD_WORD_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    END_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_KIND_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    prompt_length: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_tokens: bytes
    biases: _containers.RepeatedScalarFieldContainer[float]
    min_p: float
    typical_p: float
    no_repeat_ngram_size: int
    bad_word_lengths: bytes
    bad_word_tokens: bytes
    min_tokens: int
    end_tokens: bytes
    grammar_kind: str
    grammar: str
    def __init__(self, prompt_length: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., bias_tokens: _Optional[bytes] = ..., biases: _Optional[_Iterable[float]] = ..., min_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., no_repeat_ngram_size: _Optional[int] = ..., bad_word_lengths: _Optional[bytes] = ..., bad_word_tokens: _Optional[bytes] = ..., min_tokens: _Optional[int] = ..., end_tokens: _Optional[bytes] = ..., grammar_kind: _Optional[str] = ..., grammar: _Optional[str] = ...) -> None: ...

class TapRequest(_message.Message):
    __slots__ = ("head", "prompt_rows")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ROWS_FIELD_NUMBER: _ClassVar[int]
    head: bytes
    prompt_rows: int
    def __init__(self, head: _Optional[bytes] = ..., prompt_rows: _Optional[int] = ...) -> None: ...

class Resumption(_message.Message):
    __slots__ = ("trunk_length", "tip")
    TRUNK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TIP_FIELD_NUMBER: _ClassVar[int]
    trunk_length: int
    tip: int
    def __init__(self, trunk_length: _Optional[int] = ..., tip: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("version", "session", "epoch", "resumption", "ticket", "next_hop", "replays", "taps")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESUMPTION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NEXT_HOP_FIELD_NUMBER: _ClassVar[int]
    REPLAYS_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    version: int
    session: bytes
    epoch: int
    resumption: Resumption
    ticket: bytes
    next_hop: NextHop
    replays: bool
    taps: TapRequest
    def __init__(self, version: _Optional[int] = ..., session: _Optional[bytes] = ..., epoch: _Optional[int] = ..., resumption: _Optional[_Union[Resumption, _Mapping]] = ..., ticket: _Optional[bytes] = ..., next_hop: _Optional[_Union[NextHop, _Mapping]] = ..., replays: bool = ..., taps: _Optional[_Union[TapRequest, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session", "epoch", "credit_rows", "profile", "prefix_rows", "proposal_nodes", "rules_digest")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CREDIT_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_NODES_FIELD_NUMBER: _ClassVar[int]
    RULES_DIGEST_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    epoch: int
    credit_rows: int
    profile: _containers.RepeatedCompositeFieldContainer[ProfilePoint]
    prefix_rows: int
    proposal_nodes: int
    rules_digest: bytes
    def __init__(self, session: _Optional[bytes] = ..., epoch: _Optional[int] = ..., credit_rows: _Optional[int] = ..., profile: _Optional[_Iterable[_Union[ProfilePoint, _Mapping]]] = ..., prefix_rows: _Optional[int] = ..., proposal_nodes: _Optional[int] = ..., rules_digest: _Optional[bytes] = ...) -> None: ...

class ProfilePoint(_message.Message):
    __slots__ = ("rows", "microseconds")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MICROSECONDS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    microseconds: int
    def __init__(self, rows: _Optional[int] = ..., microseconds: _Optional[int] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("session", "trunk_length", "tip")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRUNK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TIP_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    trunk_length: int
    tip: int
    def __init__(self, session: _Optional[bytes] = ..., trunk_length: _Optional[int] = ..., tip: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("stamp", "session")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    stamp: int
    session: bytes
    def __init__(self, stamp: _Optional[int] = ..., session: _Optional[bytes] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("stamp", "received", "passed_on", "replayed")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PASSED_ON_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    stamp: int
    received: int
    passed_on: int
    replayed: int
    def __init__(self, stamp: _Optional[int] = ..., received: _Optional[int] = ..., passed_on: _Optional[int] = ..., replayed: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class HopTiming(_message.Message):
    __slots__ = ("queue_us", "compute_us", "rows", "batch_sessions")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    compute_us: int
    rows: int
    batch_sessions: int
    def __init__(self, queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., rows: _Optional[int] = ..., batch_sessions: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("session", "epoch", "seq", "ids", "tokens", "logprobs", "timings", "alternatives", "alternative_logprobs", "scored")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    epoch: int
    seq: int
    ids: bytes
    tokens: bytes
    logprobs: bytes
    timings: _containers.RepeatedCompositeFieldContainer[HopTiming]
    alternatives: bytes
    alternative_logprobs: bytes
    scored: ScoredRows
    def __init__(self, session: _Optional[bytes] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., ids: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., timings: _Optional[_Iterable[_Union[HopTiming, _Mapping]]] = ..., alternatives: _Optional[bytes] = ..., alternative_logprobs: _Optional[bytes] = ..., scored: _Optional[_Union[ScoredRows, _Mapping]] = ...) -> None: ...

class ScoredRows(_message.Message):
    __slots__ = ("logprobs", "alternatives", "alternative_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: bytes
    alternatives: bytes
    alternative_logprobs: bytes
    def __init__(self, logprobs: _Optional[bytes] = ..., alternatives: _Optional[bytes] = ..., alternative_logprobs: _Optional[bytes] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("session", "epoch", "tip", "root", "parents", "tokens", "scores")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIP_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    epoch: int
    tip: int
    root: int
    parents: bytes
    tokens: bytes
    scores: bytes
    def __init__(self, session: _Optional[bytes] = ..., epoch: _Optional[int] = ..., tip: _Optional[int] = ..., root: _Optional[int] = ..., parents: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., scores: _Optional[bytes] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("session", "code", "message", "fatal")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    code: str
    message: str
    fatal: bool
    def __init__(self, session: _Optional[bytes] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., fatal: bool = ...) -> None: ...

class LinkHello(_message.Message):
    __slots__ = ("version", "session", "epoch", "ticket", "warm_up", "packs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    WARM_UP_FIELD_NUMBER: _ClassVar[int]
    PACKS_FIELD_NUMBER: _ClassVar[int]
    version: int
    session: bytes
    epoch: int
    ticket: bytes
    warm_up: bytes
    packs: bool
    def __init__(self, version: _Optional[int] = ..., session: _Optional[bytes] = ..., epoch: _Optional[int] = ..., ticket: _Optional[bytes] = ..., warm_up: _Optional[bytes] = ..., packs: bool = ...) -> None: ...

class LinkWelcome(_message.Message):
    __slots__ = ("unpacks",)
    UNPACKS_FIELD_NUMBER: _ClassVar[int]
    unpacks: bool
    def __init__(self, unpacks: bool = ...) -> None: ...

class SamplingSettings(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "sample")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    sample: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., sample: _Optional[int] = ...) -> None: ...

class Append(_message.Message):
    __slots__ = ("epoch", "seq", "commit", "first_id", "parents", "tokens", "prefill", "answers", "settings", "skipped", "hidden", "planes", "timings", "fresh", "replay", "prefix", "tap_sums", "scored")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TAP_SUMS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    commit: bytes
    first_id: int
    parents: bytes
    tokens: bytes
    prefill: bool
    answers: Answers
    settings: SamplingSettings
    skipped: bytes
    hidden: bytes
    planes: int
    timings: _containers.RepeatedCompositeFieldContainer[HopTiming]
    fresh: bool
    replay: bool
    prefix: int
    tap_sums: TapSums
    scored: bytes
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., commit: _Optional[bytes] = ..., first_id: _Optional[int] = ..., parents: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., prefill: bool = ..., answers: _Optional[_Union[Answers, str]] = ..., settings: _Optional[_Union[SamplingSettings, _Mapping]] = ..., skipped: _Optional[bytes] = ..., hidden: _Optional[bytes] = ..., planes: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[HopTiming, _Mapping]]] = ..., fresh: bool = ..., replay: bool = ..., prefix: _Optional[int] = ..., tap_sums: _Optional[_Union[TapSums, _Mapping]] = ..., scored: _Optional[bytes] = ...) -> None: ...

class TapSums(_message.Message):
    __slots__ = ("rows", "blocks", "data")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    blocks: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, rows: _Optional[bytes] = ..., blocks: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class NodeRecord(_message.Message):
    __slots__ = ("version", "generation", "expires", "state", "address", "pin", "reachable", "name", "model", "weights", "dtype", "quantization", "span", "blocks", "rate", "hop_s", "free_tokens", "total_tokens", "coordinate", "software", "activations", "driver", "speculator", "agreement", "tap_head", "taps", "rules", "grammar")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    HOP_S_FIELD_NUMBER: _ClassVar[int]
    FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COORDINATE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    SPECULATOR_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    TAP_HEAD_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    version: int
    generation: int
    expires: int
    state: str
    address: str
    pin: bytes
    reachable: bool
    name: str
    model: bytes
    weights: bytes
    dtype: str
    quantization: str
    span: Span
    blocks: int
    rate: float
    hop_s: float
    free_tokens: int
    total_tokens: int
    coordinate: _containers.RepeatedScalarFieldContainer[float]
    software: str
    activations: str
    driver: int
    speculator: str
    agreement: float
    tap_head: bytes
    taps: _containers.RepeatedScalarFieldContainer[int]
    rules: int
    grammar: str
    def __init__(self, version: _Optional[int] = ..., generation: _Optional[int] = ..., expires: _Optional[int] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., pin: _Optional[bytes] = ..., reachable: bool = ..., name: _Optional[str] = ..., model: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., span: _Optional[_Union[Span, _Mapping]] = ..., blocks: _Optional[int] = ..., rate: _Optional[float] = ..., hop_s: _Optional[float] = ..., free_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., coordinate: _Optional[_Iterable[float]] = ..., software: _Optional[str] = ..., activations: _Optional[str] = ..., driver: _Optional[int] = ..., speculator: _Optional[str] = ..., agreement: _Optional[float] = ..., tap_head: _Optional[bytes] = ..., taps: _Optional[_Iterable[int]] = ..., rules: _Optional[int] = ..., grammar: _Optional[str] = ...) -> None: ...

class SealedRecord(_message.Message):
    __slots__ = ("record", "key", "signature")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    key: bytes
    signature: bytes
    def __init__(self, record: _Optional[bytes] = ..., key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ReportLost(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nodes: _Optional[_Iterable[str]] = ...) -> None: ...

class Watch(_message.Message):
    __slots__ = ("version", "everyone", "clock")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EVERYONE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    version: int
    everyone: bool
    clock: int
    def __init__(self, version: _Optional[int] = ..., everyone: bool = ..., clock: _Optional[int] = ...) -> None: ...

class Records(_message.Message):
    __slots__ = ("sealed", "clock")
    SEALED_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    sealed: _containers.RepeatedScalarFieldContainer[bytes]
    clock: int
    def __init__(self, sealed: _Optional[_Iterable[bytes]] = ..., clock: _Optional[int] = ...) -> None: ...

class DialBack(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class DialledBack(_message.Message):
    __slots__ = ("reached", "why")
    REACHED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    reached: bool
    why: str
    def __init__(self, reached: bool = ..., why: _Optional[str] = ...) -> None: ...

class Manage(_message.Message):
    __slots__ = ("action", "stamp", "signature")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    action: str
    stamp: int
    signature: bytes
    def __init__(self, action: _Optional[str] = ..., stamp: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Managed(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class FindSwarm(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class SwarmFound(_message.Message):
    __slots__ = ("registry",)
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    registry: str
    def __init__(self, registry: _Optional[str] = ...) -> None: ...

class LeasePort(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class PortLeased(_message.Message):
    __slots__ = ("port", "fetch_port")
    PORT_FIELD_NUMBER: _ClassVar[int]
    FETCH_PORT_FIELD_NUMBER: _ClassVar[int]
    port: int
    fetch_port: int
    def __init__(self, port: _Optional[int] = ..., fetch_port: _Optional[int] = ...) -> None: ...

class IncomingConnection(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    def __init__(self, token: _Optional[bytes] = ...) -> None: ...

class Drive(_message.Message):
    __slots__ = ("version", "text", "numerics", "prompt", "settings", "max_new_tokens", "stop_ids", "auto_tree", "tree_size", "prefix_secret", "rules")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    AUTO_TREE_FIELD_NUMBER: _ClassVar[int]
    TREE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SECRET_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    version: int
    text: bytes
    numerics: NumericsClass
    prompt: bytes
    settings: SamplingSettings
    max_new_tokens: int
    stop_ids: bytes
    auto_tree: bool
    tree_size: int
    prefix_secret: bytes
    rules: RulesRequest
    def __init__(self, version: _Optional[int] = ..., text: _Optional[bytes] = ..., numerics: _Optional[_Union[NumericsClass, _Mapping]] = ..., prompt: _Optional[bytes] = ..., settings: _Optional[_Union[SamplingSettings, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop_ids: _Optional[bytes] = ..., auto_tree: bool = ..., tree_size: _Optional[int] = ..., prefix_secret: _Optional[bytes] = ..., rules: _Optional[_Union[RulesRequest, _Mapping]] = ...) -> None: ...

class DrivenTokens(_message.Message):
    __slots__ = ("text", "tokens", "logprobs", "traversal", "hops", "prefix_rows")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRAVERSAL_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_ROWS_FIELD_NUMBER: _ClassVar[int]
    text: bytes
    tokens: bytes
    logprobs: bytes
    traversal: DrivenTraversal
    hops: _containers.RepeatedCompositeFieldContainer[DrivenHop]
    prefix_rows: int
    def __init__(self, text: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., traversal: _Optional[_Union[DrivenTraversal, _Mapping]] = ..., hops: _Optional[_Iterable[_Union[DrivenHop, _Mapping]]] = ..., prefix_rows: _Optional[int] = ...) -> None: ...

class DrivenTraversal(_message.Message):
    __slots__ = ("seconds_us", "compute_us", "queue_us", "draft_us", "rows", "drafted", "accepted", "missed", "repairs")
    SECONDS_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    DRAFT_US_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    REPAIRS_FIELD_NUMBER: _ClassVar[int]
    seconds_us: int
    compute_us: int
    queue_us: int
    draft_us: int
    rows: int
    drafted: int
    accepted: int
    missed: bool
    repairs: int
    def __init__(self, seconds_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., draft_us: _Optional[int] = ..., rows: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., missed: bool = ..., repairs: _Optional[int] = ...) -> None: ...

class DrivenHop(_message.Message):
    __slots__ = ("node", "address", "span")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    span: Span
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ..., span: _Optional[_Union[Span, _Mapping]] = ...) -> None: ...
