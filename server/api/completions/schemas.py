"""What requests for completions may say."""

from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.api.completions import refused
from server.api.completions.structured import StructuredFields
from server.api.http.fields import CacheSalt, CheckedFields, Fields, TokenIds, refusal
from server.wire.exchange import MOST_TAKEN

MAX_PROMPTS = 1024
"""Most prompts in one request; the queue of a variant may hold fewer."""
MAX_CHOICES = 128
"""Most choices for one prompt."""
MAX_BIASES = 1024
"""Most tokens whose logits one request changes."""
MAX_LOGPROBS = 20
"""Most alternatives reported at a position."""


def _few_biases(value: Any) -> Any:
    """Refuse too many entries before any is looked at: each bad one would make an error."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "too_long", "may have {most} entries, and has {count}", {"most": MAX_BIASES, "count": len(value)}
        )
    return value


def _prompt_kind(value: Any) -> str:
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "id_lists" if isinstance(first, list) else "ids"


NonEmpty = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag("id_lists")],
    Discriminator(_prompt_kind),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]


class SamplingFields(CheckedFields):
    """How text is generated; the same in every endpoint that generates."""

    no_ops = refused.GENERATION

    max_tokens: int | None = Field(16, ge=0, le=2**31, description="Most tokens to generate.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed, same draws.")
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="Text that ends the completion; not part of it."
    )
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = Field(
        False, description="Keep what ended the completion, a stop text or token, in the text."
    )
    ignore_eos: bool | None = Field(False, description="Go on after an end-of-text token.")
    min_tokens: int | None = Field(
        0, ge=0, le=2**31, description="Neither a stop token nor a stop string ends it before."
    )
    skip_special_tokens: bool | None = True
    presence_penalty: Penalty | None = Field(
        0.0, description="Taken off the logit of each token generated so far."
    )
    frequency_penalty: Penalty | None = Field(0.0, description="Likewise, times how often it was generated.")
    repetition_penalty: float | None = Field(
        1.0, ge=0.01, le=100, description="Divides the logits of tokens in the prompt or generated; 1 is off."
    )
    logit_bias: Annotated[dict[BiasKey, Bias], BeforeValidator(_few_biases)] | None = Field(
        None, description="Token id -> added to its logit."
    )
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Only these tokens may be generated."
    )
    add_special_tokens: bool | None = Field(
        None, description="As the tokenizer does by itself; default true for a prompt, false for messages."
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        le=2**31,
        description="Leave of the prompt its last so many tokens; -1: as many as fit beside max_tokens.",
    )
    priority: int | None = Field(
        0,
        ge=-(2**31),
        lt=2**31,
        description="Lower runs first; no lower than the key's configuration allows (0).",
    )

    cache_salt: CacheSalt = None

    @property
    def token_limit(self) -> int:
        """`max_tokens`, or OpenAI's default where it is null."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def given_limit(self) -> int | None:
        """What `min_tokens` must not be above; None where the context alone limits."""
        return self.token_limit

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token's log-probability; None: no log-probabilities."""
        return None

    def _nothing_to_generate(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_tokens == 0 and not self._nothing_to_generate():
            raise refusal("max_tokens", "must be at least 1 (0 only with echo), got 0")
        if self.given_limit is not None and (self.min_tokens or 0) > self.given_limit:
            raise refusal(
                "min_tokens", f"must not be above max_tokens {self.given_limit}, got {self.min_tokens}"
            )
        if self.truncate_prompt_tokens == 0:
            raise refusal("truncate_prompt_tokens", "must be -1 or at least 1, got 0")
        return self


class StreamOptions(Fields):
    include_usage: Annotated[bool | None, Field(description="One more chunk with the usage at the end.")] = (
        False
    )
    continuous_usage_stats: Annotated[bool | None, Field(description="The usage so far in every chunk.")] = (
        False
    )
    stream_interval: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_TAKEN,
            description="Tokens in a chunk, at least; fewer in the first and in the last.",
        ),
    ] = 1

    @property
    def interval(self) -> int:
        """`stream_interval`, or its default where it is null."""
        return 1 if self.stream_interval is None else self.stream_interval


class ChoiceFields(SamplingFields, StructuredFields):
    """What completions and chat share."""

    no_ops = refused.CHOICES

    model: str = Field(description="A variant's name or an alias.", max_length=256)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    best_of: int | None = Field(None, description="Not supported: null, or the same as n.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Used for sticky routing only.")

    @property
    def choices_each(self) -> int:
        return 1 if self.n is None else self.n

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices_each:
            raise refusal("best_of", "is not supported")
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "needs stream: true")
        return self


class CompletionRequest(ChoiceFields):
    """POST /v1/completions."""

    no_ops = refused.COMPLETIONS

    prompt: Prompts = Field(description="Texts, or token ids of the model's own tokenizer; one or several.")
    echo: bool | None = Field(False, description="Give back the prompt before the completion.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probability of each token, and of this many alternatives.",
    )
    state_id: str | None = Field(
        None, max_length=64, description="A saved state to go on from; the prompt is then what follows it."
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts as a list, whatever the form of `prompt`."""
        value: Any = self.prompt
        return value if _prompt_kind(value) in ("texts", "id_lists") else [value]

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def _nothing_to_generate(self) -> bool:
        return bool(self.echo)

    @model_validator(mode="after")
    def _check_state(self) -> Self:
        if self.state_id is not None and self.echo:
            raise refusal("echo", "is not possible with state_id: the text before the state is not kept")
        if self.state_id is not None and self.repetition_penalty not in (None, 1):
            raise refusal(
                "repetition_penalty",
                "is not possible with state_id: the tokens before the state are not kept",
            )
        return self
