"""What the answers to requests for completions look like.

These models are for the OpenAPI document only: the handlers send plain tables. Tests hold the two together.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from modeling.state_dtype import StateDType

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


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
    state_bytes: int = Field(
        description="What the request held at its end, of all choices: the sum of the three that follow."
    )
    recurrent_bytes: int = Field(description="Recurrent states, with the scales of those in int8.")
    conv_bytes: int = Field(description="Last inputs of the short convolutions.")
    kv_bytes: int = Field(
        description="Pages of keys and values; 0 for a model without softmax attention. Pages that choices share count "
        "in each of them."
    )
    state_dtype: StateDType = Field(description="Dtype of the recurrent state.")
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


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, whole unless the answer was cut.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="Null where there are tool calls and nothing else.")
    refusal: None
    reasoning_content: str | None = Field(None, description="What the model thought before; only if it did.")
    reasoning: str | None = Field(None, description="The same by vLLM's name.")
    tool_calls: list[ToolCall] | None = Field(None, description="Only if there are any.")


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str = Field(description="The variant that answered.")
    choices: list[ChatChoice]
    usage: Usage
    lowkey: Lowkey
