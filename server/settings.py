"""Settings of the API process: command line first, then environment (`LOWKEY_...`), then these defaults."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict

VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Becomes a metric label and part of a file name."""


StateMemory = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | Annotated[ByteSize, Field(ge=2**10), AfterValidator(int)],
    Field(union_mode="left_to_right"),
]
"""A share of the free memory, or bytes ("2GiB")."""


class Settings(BaseSettings):
    """How the server runs. Model paths come from here only, never from a request."""

    model_config = SettingsConfigDict(env_prefix="LOWKEY_", extra="forbid")

    variants: dict[VariantName, str] = Field(
        default_factory=dict,
        description="Variant name -> checkpoint directory or hub id; the first is the default.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
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
        description="Memory of each variant's state slots: bytes (2GiB) or a share of what is free once its weights "
        "are loaded (0.5); by default a slot for each of max_requests, 64 if that isn't given either.",
    )
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="The recurrent state; bfloat16 halves it and rounds it after every token."
    )
    prefix_cache: bool = Field(
        True, description="Keep states of prompts in free slots, for prompts that begin alike."
    )
    batch_invariant: bool = Field(
        False,
        description="Tokens are bit for bit the same whatever else runs; slower, for paired comparisons.",
    )
    max_queue: int = Field(
        256, ge=0, description="Requests that may wait in each variant before 503 queue_full."
    )
    prefill_tokens: int = Field(
        512,
        ge=64,
        multiple_of=64,
        description="Most prompt tokens in one step, so that a long prompt delays nobody long.",
    )
    hang_s: float = Field(
        30.0,
        ge=2,
        description="An engine that gives no sign of life for so long is killed and started again.",
    )
    threads: int = Field(1, ge=1, description="CPU threads of each engine process.")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Largest request body; more is a 413.")
    compare_bytes: int = Field(
        2**30, ge=2**20, description="Most shared memory for the log-probabilities of one /v1/compare."
    )
    drain_s: float = Field(30.0, ge=0, description="How long requests may go on after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Verbosity of the log."
    )
