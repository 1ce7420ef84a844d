"""What requests may say. Unknown fields are ignored; a known field with a bad value is an error that names it."""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError


def _only(*no_ops: Any, when: str = "yet") -> BeforeValidator:
    """A field that we don't run: accepted where its value changes nothing."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if any(type(value) is type(no_op) and value == no_op for no_op in no_ops):
            return value
        text = f"{info.field_name} is not supported {when}".rstrip()
        raise PydanticCustomError("not_supported", "{text}", {"text": text})

    return BeforeValidator(check)


def _prompt(value: Any) -> Any:
    """Tell apart what is wrong from what is only not there yet."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as e:  # JSON may hold half a surrogate pair, which no tokenizer takes
            raise PydanticCustomError(
                "not_text", "is no valid text at character {at}", {"at": e.start}
            ) from None
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        raise PydanticCustomError("not_supported", "several prompts in one request are not supported yet")
    return value


Name = Annotated[str, StringConstraints(max_length=64)]
NonEmpty = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""Fails at the first bad id: a million of them would make a million errors, of which ten are shown."""


class SamplingFields(BaseModel):
    """How text is generated; the same in every endpoint that generates."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Annotated[str | TokenIds, BeforeValidator(_prompt)] = Field(
        description="Text, or token ids of the model's own tokenizer."
    )
    max_tokens: int | None = Field(16, ge=1, le=2**31, description="Most tokens to generate.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Same seed, same draws.")
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="Text that ends the completion; not part of it."
    )
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    ignore_eos: bool | None = Field(False, description="Go on after an end-of-text token.")
    skip_special_tokens: bool | None = True

    n: Annotated[Any, _only(None, 1)] = None
    best_of: Annotated[Any, _only(None, 1, when="")] = None
    echo: Annotated[Any, _only(None, False)] = None
    logprobs: Annotated[Any, _only(None, False)] = None
    logit_bias: Annotated[Any, _only(None, {})] = None
    frequency_penalty: Annotated[Any, _only(None, 0, 0.0)] = None
    presence_penalty: Annotated[Any, _only(None, 0, 0.0)] = None
    repetition_penalty: Annotated[Any, _only(None, 1, 1.0)] = None
    min_tokens: Annotated[Any, _only(None, 0)] = None
    priority: Annotated[Any, _only(None, 0)] = None
    state_id: Annotated[Any, _only(None)] = None
    suffix: Annotated[Any, _only(None, when="")] = None
    tools: Annotated[Any, _only(None, [], when="")] = None
    response_format: Annotated[Any, _only(None, {"type": "text"}, when="")] = None

    @property
    def token_limit(self) -> int:
        """`max_tokens`, or OpenAI's default where it is null."""
        return 16 if self.max_tokens is None else self.max_tokens


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: Annotated[bool | None, Field(description="One more chunk with the usage at the end.")] = (
        False
    )
    continuous_usage_stats: Annotated[bool | None, Field(description="The usage so far in every chunk.")] = (
        False
    )


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    model: str = Field(description="A variant's name.", max_length=256)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted for clients that send it.")


class CompareRequest(SamplingFields):
    """POST /v1/compare."""

    variants: Annotated[list[Name], Field(min_length=2, max_length=16, fail_fast=True)] | None = Field(
        None, description="Which variants; all of them if not given."
    )
    baseline: Name | None = Field(
        None, description="What the others are compared with; the first one if not given."
    )
    parallel: bool | None = Field(
        False, description="Decode at the same time: faster, but the speeds are then not comparable."
    )
    stream: bool | None = Field(False, description="Events of each variant as they come, then the answer.")
