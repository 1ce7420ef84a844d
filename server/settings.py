"""Settings of the API process: command line first, then environment (`LOWKEY_...`), then the file of `--config`, then
these defaults."""

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from modeling.state_dtype import StateDType
from server.keys import ApiKey, check_owners, keys_of

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What a variant, an alias or a key may be called: it becomes a metric label and part of a file name."""
VariantName = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
KeyName = VariantName
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
DType = Literal["auto", "float32", "bfloat16"]
ToolCallParser = Literal["auto", "none", "qwen3_coder", "qwen3_xml", "hermes", "olmo3"]
ReasoningParser = Literal["auto", "none", "qwen3", "olmo3"]
GenerationConfig = Literal["auto", "none"]
DeviceMemory = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigurationError(Exception):
    """Settings that can't be used; the message names each key, its value, and what would be right."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VariantSettings(_Table):
    """The settings of one variant."""

    source: str = Field(min_length=1, description="Checkpoint directory or hub id.")
    device: Device | None = Field(default=None, description="Instead of the server's `device`.")
    dtype: DType | None = Field(default=None, description="Instead of the server's `dtype`.")
    state_dtype: StateDType | None = Field(default=None, description="Instead of the server's `state_dtype`.")
    device_memory: DeviceMemory | None = Field(
        default=None,
        description="Share of its GPU's memory; by default an equal part of what the GPU's other variants leave of the "
        "server's `device_memory`.",
    )
    tool_call_parser: ToolCallParser | None = Field(
        default=None, description="Instead of the server's `tool_call_parser`."
    )
    reasoning_parser: ReasoningParser | None = Field(
        default=None, description="Instead of the server's `reasoning_parser`."
    )
    generation_config: GenerationConfig | None = Field(
        default=None, description="Instead of the server's `generation_config`."
    )


def _variant(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class Sticky(_Table):
    """What keeps a client on one variant of an alias."""

    by: list[Literal["api_key", "user", "header"]] = Field(
        default=["user"],
        description="Tried in this order; the first that a request has counts. A request that has none is drawn "
        "anew. Empty: every request is.",
    )
    header: str = Field(
        default="x-lowkey-user", pattern=r"^[a-z0-9-]+$", description="The header that `header` means."
    )
    seed: int = Field(default=0, description="Seed of the hash; another one deals all clients anew.")


class ShadowRule(_Table):
    """A fraction of one variant's requests that is repeated on another in the background."""

    source: VariantName = Field(alias="from", description="The variant that answers the user.")
    target: VariantName = Field(alias="to", description="The variant that is measured against it.")
    fraction: float = Field(gt=0, le=1, description="Share of the requests that end well.")


ApiKeys = Annotated[dict[KeyName, ApiKey], NoDecode, BeforeValidator(keys_of)]


StateMemory = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | Annotated[ByteSize, Field(ge=2**10), AfterValidator(int)],
    Field(union_mode="left_to_right"),
]
"""A share of the free memory, or bytes ("2GiB")."""


class Settings(BaseSettings):
    """How the server runs. Model paths come from here only, never from a request."""

    model_config = SettingsConfigDict(env_prefix="LOWKEY_", extra="forbid")

    variants: dict[VariantName, Annotated[VariantSettings, BeforeValidator(_variant)]] = Field(
        default_factory=dict,
        description="Variant name -> checkpoint directory or hub id, or a table with `source`, `device`, "
        "`dtype`, `state_dtype`, `device_memory`, `tool_call_parser`, `reasoning_parser` and `generation_config`; "
        "the first is the default.",
    )
    aliases: dict[VariantName, Annotated[dict[VariantName, Weight], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Alias -> variant -> weight: a name that clients ask for and that is split over variants.",
    )
    sticky: Sticky = Field(Sticky(), description="What keeps a client on one variant of an alias.")
    shadow: list[ShadowRule] = Field(
        default_factory=list, description="Requests that are repeated on another variant, for metrics only."
    )
    shadow_bytes: int = Field(
        2**28, ge=2**20, description="Most shared memory for the log-probabilities of shadow traffic."
    )
    ab_samples: int = Field(
        20_000,
        ge=100,
        le=10**7,
        description="Requests, and token gaps times ten, that /v1/ab/summary remembers.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    dtype: DType = Field(
        "auto",
        description="Weights and activations; auto is float32 on a CPU, bfloat16 on a GPU.",
    )
    max_requests: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Requests that run at once in each variant; by default as many as there are state slots.",
    )
    state_memory: StateMemory | None = Field(
        None,
        description="Memory of each variant's states: bytes (2GiB) or a share of what its weights and its work leave "
        "(0.5); by default on a GPU all of that, on a CPU what max_requests need, or 64 if that isn't given either.",
    )
    context_tokens: int = Field(
        4096,
        ge=1,
        le=2**24,
        description="Tokens that a request is expected to hold, prompt and answer. It divides the memory for states of "
        "a model with softmax attention into slots and pages of keys and values; a request may hold more as long as "
        "there are pages. Other models have no pages.",
    )
    device_memory: DeviceMemory = Field(
        0.9,
        description="Share of each GPU's memory that the variants on it may take together, weights and all.",
    )
    state_dtype: StateDType = Field(
        "float32",
        description="The recurrent state: float32, bfloat16 (half of it) or int8 (a quarter, and a scale for each "
        "value channel); narrower ones are rounded after every generated token and every piece of a prompt.",
    )
    tool_call_parser: ToolCallParser = Field(
        "auto",
        description="The format in which models write calls of tools, by vLLM's names; auto: as the chat template "
        "writes them; none: calls stay text.",
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="The format in which models write thoughts, by vLLM's names; auto: as the chat template writes "
        "them; none: thoughts stay text.",
    )
    generation_config: GenerationConfig = Field(
        "auto",
        description="auto: sampling that a request says nothing of is as generation_config.json in the checkpoint "
        "says; none: it is the API's own default.",
    )
    prefix_cache: bool = Field(
        True, description="Keep states of prompts in free slots, for prompts that begin alike."
    )
    shared_prefix_cache: bool = Field(
        False,
        description="Share these states among all API keys. By default each key has its own: by a hit and its speed a "
        "client could tell that another one has sent the same text.",
    )
    batch_invariant: bool = Field(
        False,
        description="Tokens are bit for bit the same whatever else runs; slower, for paired comparisons.",
    )
    max_queue: int = Field(
        256, ge=0, description="Requests that may wait in each variant before 503 queue_full."
    )
    prefill_tokens: int | None = Field(
        None,
        ge=64,
        multiple_of=64,
        description="Most prompt tokens in one step, so that a long prompt delays nobody long; by default 128 on a CPU "
        "and 4096 on a GPU.",
    )
    hang_s: float = Field(
        120.0,
        ge=2,
        description="An engine, or one of several API processes, that gives no sign of life for so long is killed and "
        "started again.",
    )
    api_processes: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Processes that answer HTTP requests, on one port; by default 1, and with a model on a GPU one for "
        "each 4 cores, up to 4.",
    )
    threads: int = Field(1, ge=1, description="CPU threads of each engine process.")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body; more is a 413.")
    max_answer_entries: int = Field(
        2_000_000,
        ge=1000,
        description="Most entries of one answer: choices times tokens (of prompts with echo, of completions with "
        "logprobs) times 1 + alternatives; more is a 400.",
    )
    compare_bytes: int = Field(
        2**30, ge=2**20, description="Most shared memory for the log-probabilities of one /v1/compare."
    )
    state_dir: Path | None = Field(
        None, description="Where saved states are kept; none: /v1/states is off. Replicas may share it."
    )
    state_ttl_s: float = Field(
        86400.0,
        gt=0,
        allow_inf_nan=False,
        description="A saved state that nobody used for so long is gone.",
    )
    state_budget_bytes: int = Field(
        4 * 2**30, ge=2**10, description="Most bytes of all saved states; the least recently used go first."
    )
    header_timeout_s: float = Field(
        10.0, gt=0, description="How long a connection may take to send a request's headers."
    )
    body_timeout_s: float = Field(
        30.0, gt=0, description="How long the rest of a request may take; then 408."
    )
    linger_s: float = Field(
        2.0,
        gt=0,
        description="How long the rest of a request that has been answered already may take; then its "
        "connection is closed.",
    )
    write_timeout_s: float = Field(
        10.0,
        gt=0,
        description="A client that takes nothing (less than 16 KiB) of an answer that waits for it for so long loses "
        "its connection, and its requests end.",
    )
    stream_buffer_bytes: int = Field(
        4 * 2**20,
        ge=2**16,
        description="Most memory of a stream's tokens that its client has not taken yet; beyond that its requests are "
        "decoded no further until it has.",
    )
    request_timeout_s: float = Field(
        1800.0, gt=0, description="How long a request may take in all; then 504, or a stream's error event."
    )
    api_keys: ApiKeys = Field(
        default_factory=dict,
        description="Name -> key; none: no key is asked for. In the environment `name=key,name=key`.",
    )
    api_keys_file: Path | None = Field(
        None,
        description='A TOML file with more keys: `name = "key"`, `name = ["new key", "old key"]`, or a table with '
        "`key` and limits. SIGHUP reads it again.",
    )
    public_paths: list[str] = Field(
        default=["/", "/health", "/ready", "/metrics"],
        description="Paths that need no key where keys are set; / is the compare page with its own files.",
    )
    requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="Limit of each key (of all clients together where no keys are set); more is a 429.",
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Likewise, prompt and completion tokens together."
    )
    cors_origins: list[str] = Field(
        default_factory=list,
        description="Web pages' origins that may call the API from a browser; none by default.",
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        description="After SIGTERM, how long requests are still taken with /ready at 503 already: until load balancers "
        "have noticed.",
    )
    drain_s: float = Field(30.0, ge=0, description="How long requests may go on after that.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Verbosity of the log."
    )
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or JSON lines.")
    log_texts: bool = Field(
        False, description="Put prompts and completions into the log; they are never there otherwise."
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        check_routing(self, set(self.variants))
        check_owners(self.api_keys)
        device_shares(self)
        return self


def device_shares(settings: Settings) -> dict[str, float]:
    """The share of its GPU's memory that each variant may take. "auto" counts as the first GPU; of a CPU nobody has a
    share, so that those of `device = "cpu"` are all 1.

    Raises:
        ValueError: the variants of one GPU name more than there is, or leave nothing for one that names none.
    """
    by_device: dict[str, dict[str, float | None]] = {}
    for name, variant in settings.variants.items():
        device = variant.device or settings.device
        device = "cuda:0" if device in ("auto", "cuda") else device
        by_device.setdefault(device, {})[name] = variant.device_memory
    shares = dict.fromkeys(by_device.pop("cpu", ()), 1.0)
    for device, variants in by_device.items():
        named = {name: share for name, share in variants.items() if share is not None}
        rest = [name for name in variants if name not in named]
        total = math.fsum(named.values())
        if total > 1:
            raise ValueError(
                f"variants.*.device_memory: on {device} {named} come to {total:.3g}, more than 1"
            )
        if rest and total >= settings.device_memory:
            raise ValueError(
                f"variants.*.device_memory: on {device} {named} leave nothing of device_memory = "
                f"{settings.device_memory:.3g} for {rest}"
            )
        shares |= named | dict.fromkeys(rest, (settings.device_memory - total) / max(len(rest), 1))
    return shares


def check_routing(settings: Settings, variants: set[str]) -> None:
    """Raise ValueError unless aliases and shadow rules refer to `variants`."""
    for alias, weights in settings.aliases.items():
        if alias in variants:
            raise ValueError(f"aliases.{alias}: is a variant's name too")
        for name in weights:
            if name not in variants:
                raise ValueError(f"aliases.{alias}.{name}: there is no such variant, only {sorted(variants)}")
        if not 0 < sum(weights.values()) < math.inf:
            raise ValueError(f"aliases.{alias}: the weights must have a positive sum, got {weights}")
    for number, rule in enumerate(settings.shadow):
        for key, name in (("from", rule.source), ("to", rule.target)):
            if name not in variants:
                raise ValueError(f"shadow.{number}.{key}: no variant {name!r}, only {sorted(variants)}")
        if rule.source == rule.target:
            raise ValueError(f"shadow.{number}: from and to are both {rule.source!r}")


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    # An API key must not end up on a screen, nor one in a table whose name was mistyped.
    if not where or where.startswith("api_keys") or error["type"] == "extra_forbidden":
        return f"{where}: {message}".removeprefix(": ")
    return f"{where}: {message}, got {error['input']!r}"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        raise ConfigurationError(f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # of TOML and of UTF-8; of brackets without end
        raise ConfigurationError(f"{path}: is no TOML: {e}") from e


def load_settings(config: Path | None = None, **options: Any) -> Settings:
    """Settings from `options`, the environment, and the TOML file `config`, in this order.

    Raises:
        ConfigurationError: a value is no good or a file can't be read.
    """
    # pydantic-settings would take a missing file for an empty one.
    values = {} if config is None else _read_toml(config)

    class FileSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, values)

    try:
        settings = FileSettings(**options)
        if settings.api_keys_file is None:
            return settings
        file, more = settings.api_keys_file, _read_toml(settings.api_keys_file)
        if not more:
            # It may just be written, and without keys everybody would be let in.
            raise ConfigurationError(f"{file}: has no keys; to do without, leave api_keys_file out")
        twice = sorted(settings.api_keys.keys() & more)
        if twice:
            raise ConfigurationError(f"{file}: the key names {twice} are in api_keys too")
        keys = {**settings.api_keys, **more}
        return FileSettings(**{**options, "api_keys": keys})
    except ValidationError as e:
        raise ConfigurationError("; ".join(map(_problem, e.errors()))) from e
    except ValueError as e:  # pydantic-settings' own, e.g. JSON in the environment that can't be read
        raise ConfigurationError(str(e)) from e
