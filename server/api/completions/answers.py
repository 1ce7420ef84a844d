"""What answers look like, for the OpenAPI document. The handlers send plain tables; tests hold the two together."""

from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int = Field(description="The HTTP status.")


class Error(BaseModel):
    error: ErrorDetail


_ERROR: dict[str, Any] = {"model": Error, "description": "An error; `param` names the field at fault."}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; with `stream: true` server-sent events that end with `data: [DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Of a saved state or a cached prefix: not computed anew.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Lowkey(BaseModel):
    """What the request held and how fast it was."""

    variant: str
    state_bytes: int = Field(description="Recurrent and convolution state of all choices.")
    state_dtype: str
    d_k: int | list[int]
    queue_s: float | None
    ttft_s: float | None = Field(description="From the arrival of the HTTP request to the first token.")
    decode_s: float | None = Field(
        description="From the first token to the last, by the times at which the engine made them."
    )
    tokens_per_second: float | None = Field(
        description="(tokens - 1) / decode_s; null for fewer than 8 tokens after the first."
    )
    cached_tokens: int
    finish_reason: str | None = Field(description="Null where several choices differ.")


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str = Field(description="The variant that answered.")
    choices: list[CompletionChoice]
    usage: Usage
    lowkey: Lowkey


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ContentToken]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str = Field(description="The variant that answered.")
    choices: list[ChatChoice]
    usage: Usage
    lowkey: Lowkey


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


class State(BaseModel):
    id: str
    object: Literal["state"]
    variant: str
    tokens: int
    bytes: int
    created: int
    expires: int = Field(
        description="If nobody uses it until then; each use puts it off. Seconds since 1970."
    )


class StateList(BaseModel):
    object: Literal["list"]
    data: list[State]


class DeletedState(BaseModel):
    id: str
    object: Literal["state"]
    deleted: Literal[True]
