"""What crosses the process boundary, encoded as msgpack. This module imports no torch."""

from typing import Literal

import msgspec

from modeling.state_dtype import StateDType

CANNOT_LOAD = 78
"""Exit code of an engine whose checkpoint is no good (EX_CONFIG): starting it again would not help."""

DEFAULT_SLOTS = 64
"""State slots of an engine on a CPU that was not told how many."""

PAGE_TOKENS = 64
"""Tokens of a page of keys and values, as `modeling.state` has them, which imports torch."""

FinishReason = Literal["stop", "length", "abort", "error"]

FailureReason = Literal["state", "memory", "grammar"]

Phase = Literal["prefill", "decode", "mixed"]
"""What a step's batch is made of."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine process is started; passed as JSON on its command line."""

    variant: str
    source: str
    """Checkpoint directory or hub id."""
    device: str
    dtype: Literal["auto", "float32", "bfloat16"]
    max_requests: int | None
    """Requests that run at the same time; None: one for each state slot."""
    state_memory: int | float | None = None
    """Size of the slot pool: bytes, or a share of the memory that is left; None: a slot for each of `max_requests`, on
    a GPU all that is left."""
    device_memory: float = 0.9
    """Share of a GPU's memory that the engine may take for everything. A CPU's is bounded by what is free."""
    devices: list[str] = []
    """Devices of all variants that load at the same time, this one among them."""
    state_dtype: StateDType = "float32"
    """The recurrent state; None: as suits the device."""
    context_tokens: int = 4096
    """How many tokens a request is expected to hold: what is left for states is split into slots, and pages for as many
    tokens each. A request may hold more, others then less. Models without softmax attention have no pages."""
    prefix_cache: bool = True
    batch_invariant: bool = False
    """Logits are the same bits whatever else runs; slower."""
    prefill_tokens: int | None = None
    """Most prompt tokens in one step, a multiple of 64; None: as many as suit the device."""
    threads: int
    request_address: str = ""
    """Where the engine takes requests from front ends, and answers them. The supervisor fills in both addresses."""
    report_address: str = ""
    """Where the supervisor listens to what the engine says of itself."""
    reason_path: str | None = None
    """File in which an engine that ends with CANNOT_LOAD leaves the reason."""
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    """The request's seed. A draw depends on (seed, choice, position) alone."""
    choice: int = 0
    presence_penalty: float = 0.0
    """What is taken off the logit of each token that this request has generated."""
    frequency_penalty: float = 0.0
    """What is taken off besides, times how often the token was generated."""
    repetition_penalty: float = 1.0
    """What divides the positive and multiplies the negative logits of tokens that are in the prompt or were
    generated."""
    logit_bias: dict[int, float] = {}
    """What is added to logits, by token id."""
    allowed_token_ids: list[int] = []
    """The only tokens that may be drawn; empty for all."""


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Go on from `token_ids` for up to `max_tokens` tokens."""

    request_id: str
    token_ids: list[int]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: list[int]
    """Tokens that end the request (end of text, unless the request ignores it, among them)."""
    min_tokens: int = 0
    """`stop_token_ids` can't be drawn before this many tokens."""
    logprobs: int | None = None
    """Report each token's log-probability and this many of the most likely ones; None: neither."""
    priority: int = 0
    """The priority: lower runs first, and among equals whoever came first."""
    state_path: str | None = None
    """Go on from the state saved in this file instead of an empty one."""
    state_tokens: int = 0
    """How many tokens that state has seen."""
    cache_salt: bytes = b""
    """Requests share the work on prompts that begin alike only with those of the same salt."""
    grammar: str = ""
    """What the completion is held to, as `server.text.grammar` writes it; empty for nothing. Stop tokens then can be
    drawn only where the grammar is complete, or allows nothing else."""


class KLReference(msgspec.Struct, frozen=True, kw_only=True):
    """A shared-memory file of log-probabilities, float32 `[positions, vocab]`, that two engines meet in."""

    path: str
    mode: Literal["write", "compare"]
    """The baseline writes its rows; another engine reads them and reduces them to scalars."""
    from_position: int
    """The first row belongs to this position of `token_ids`."""


class Score(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Log-probabilities of given tokens (teacher forced), for positions >= `from_position` (at least 1)."""

    request_id: str
    token_ids: list[int]
    from_position: int
    top_logprobs: int = 0
    """Also report this many of the most likely tokens at each position."""
    kl_reference: KLReference | None = None
    priority: int = 0
    cache_salt: bytes = b""
    """Requests share the work on prompts that begin alike only with those of the same salt."""


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run `token_ids` from an empty state and write the state after the last one to `path` (safetensors)."""

    request_id: str
    token_ids: list[int]
    path: str
    fingerprint: dict[str, str]
    """What is written into the file's metadata, by name."""
    cache_salt: bytes = b""
    """Requests share the work on prompts that begin alike only with those of the same salt."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Forget a request; nothing more is sent about it."""

    request_id: str


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Decode no further tokens of a request until it is resumed: its reader is behind. It keeps its state slot,
    unless others need its pages, and tokens of steps that have been launched still come."""

    request_id: str


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The reader of a paused request has caught up: decode it again."""

    request_id: str


Input = Generate | Score | SaveState | Abort | Pause | Resume
"""What an engine is told of a request."""


class FrontEndGone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A front end has ended: forget all its requests. Sent by the supervisor."""

    front_end: str


Received = Input | FrontEndGone


StateLayout = dict[str, tuple[str, list[int]]]
"""Dtype, as safetensors calls it, and shape of each tensor of a saved state by name. A first dimension of 0 is as long
as the state has seen tokens."""


def layout_after(layout: StateLayout, tokens: int) -> StateLayout:
    """The layout of a state of that many tokens, none of its first dimensions left at 0."""
    return {name: (dtype, [shape[0] or tokens, *shape[1:]]) for name, (dtype, shape) in layout.items()}


class RequestBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What a request holds of a model with its states in some dtype."""

    state_bytes: int
    """Bytes whatever its length: recurrent and convolution states."""
    kv_bytes_per_page: int
    """Bytes of the keys and values of 64 tokens; 0 for a model without softmax attention."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes of a device's memory, with its weights in some dtype."""

    other_bytes: int
    """What is not for requests: weights, workspace, graphs, and what is left to what torch does not count."""
    state_dtypes: dict[StateDType, RequestBytes]
    """By the dtypes in which its states can be served."""
    dense: dict[StateDType, RequestBytes] | None = None
    """Those of the model that it was reduced from; None for one that was not reduced, or does not say from what."""


class Planning(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes to say how many requests fit into another memory than an engine has, or with another dtype."""

    context_tokens: int
    """How many tokens a request was expected to hold when the memory was divided."""
    context_length: int
    """The longest request of the model, whatever memory there is."""
    budget: int | None
    """Bytes of the device that the engine may take for everything; None on a CPU, where only what is free bounds it."""
    dense_d_k: list[int] | None
    """Key channels per head of each linear layer of the model that it was reduced from."""
    here: Sizes
    """On the engine's own device."""
    gpu: Sizes
    """On a GPU, where weights are in bfloat16. Workspace and graphs are measured there only: an engine on a CPU leaves
    them out."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine has loaded its model. Sizes in bytes, times in seconds."""

    family: str
    d_k: list[int]
    """Key channels per head of each layer."""
    d_v: list[int]
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    checkpoint_path: str
    """The local directory, which also holds the tokenizer."""
    method: str | None
    """How the checkpoint was reduced; None for one that was not."""
    state_bytes_per_request: int
    """What each request holds whatever its length: recurrent and convolution states."""
    conv_bytes_per_request: int = 0
    """The convolution states' part of that."""
    bytes_per_page: int = 0
    """What each 64 tokens of a request add to it, the keys and values of the softmax attention layers; 0 for a model
    that has none."""
    state_layout: StateLayout = {}
    """What a saved state holds."""
    state_dtype: StateDType
    device: str
    backend: str
    weights_bytes: int
    memory: dict[str, int] = {}
    """What the device's memory goes to (`MemoryPlan.parts`)."""
    planning: Planning | None = None
    """How other plans than this one would turn out; None from an engine that has no model."""
    load_s: float
    slots: int
    pages: int = 0
    """Pages of 64 tokens' keys and values."""
    max_running: int
    """Requests that run at the same time, at most `slots`."""


TopLogprobs = list[tuple[int, float]]
"""Pairs of (token id, natural log-probability), the most likely token first."""
PackedTop = bytes
"""`TopLogprobs` as the bytes that `pack_top` makes of them. Python's garbage collector would walk over millions of
pairs again and again, for hundreds of milliseconds each time; who needs pairs unpacks a few at a time."""


class Token(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One generated token. `queue_s`, `prefill_s` and `cached_tokens` are set on the first one of a request."""

    request_id: str
    token_id: int
    at: float
    """time.monotonic() in the engine's process when the step that sampled it was collected, less the time for which
    the request had been paused until then. All speeds are made of these times: when a token reaches anybody else
    depends on how busy they are, and how long a reader stays behind says nothing of the model."""
    finish_reason: FinishReason | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    cached_tokens: int = 0
    """Prompt tokens whose state came from the prefix cache."""
    logprob: float | None = None
    """Natural log-probability by the model's own distribution, before penalties, temperature and filters."""
    top: PackedTop | None = None
    pages: int = 0
    """Pages of keys and values that the request held; set on its last token."""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """A request of any kind that can't be run, or not to its end. Nothing more is sent about it."""

    request_id: str
    reason: FailureReason
    """A saved state that is no good, a device that has no memory left for the request, or a grammar that can't be kept
    to."""
    error: str


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to Score, one entry for each position from `from_position` on."""

    request_id: str
    logprobs: list[float]
    """Natural log-probability of the given token."""
    kl: list[float]
    """With a reference to compare with: KL(reference || this model) in nats, from the reference's first position on."""
    agree: list[bool]
    """With a reference to compare with: whether both have the same most likely token, at the same positions."""
    top: list[PackedTop] = []


class StateSaved(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to SaveState."""

    request_id: str
    error: str | None = None
    """Why the file was not written."""


class Occupancy(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Who is in the engine; sent by itself when that changed without a step (an abort), and once a second as a sign of
    life."""

    running: int
    waiting: int
    paused: int = 0
    """How many of the running requests decode nothing because their reader is behind."""
    used_slots: int
    cached_slots: int = 0
    """Slots that hold prefixes and may be taken when a request needs one."""
    used_pages: int = 0
    """Pages of keys and values that running requests hold."""
    cached_pages: int = 0
    """Pages that only prefixes hold, which may be taken likewise."""
    preempted: int = 0
    """How many of the waiting requests have begun: their states are in the host's memory until there are pages for them
    again."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of the engine brought for the requests of one front end."""

    made_at: float
    """The step's, as in `Step`."""
    tokens: list[Token] = []
    scored: list[Scored] = []
    saved: list[StateSaved] = []
    failed: list[Failed] = []


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the supervisor is told of one step of the engine."""

    made_at: float
    """time.monotonic() when the step's output was made: later than that of all steps before, also of engines that were
    there before. All processes of a machine have one such clock."""
    phase: Phase
    step_s: float
    batch_size: int
    """0 where no step was run: requests failed, or files have been written."""
    occupancy: Occupancy
    cache_queries: int = 0
    """Prompt tokens that the prefix cache might have had: all but those whose logits are needed."""
    cache_hits: int = 0
    """Prompt tokens among them whose state was there."""
    preemptions: int = 0
    """How many requests gave their slot and pages away before it, for others."""


Report = Ready | Step | Occupancy
"""What an engine tells its supervisor."""


def one_or_all(values: list[int]) -> int | list[int]:
    """The single value when all layers agree, else the list."""
    return values[0] if len(set(values)) == 1 else values


encoder = msgspec.msgpack.Encoder()
input_decoder = msgspec.msgpack.Decoder(Received)
pack_top = encoder.encode
unpack_top = msgspec.msgpack.Decoder(TopLogprobs).decode
answers_decoder = msgspec.msgpack.Decoder(Answers)
report_decoder = msgspec.msgpack.Decoder(Report)
