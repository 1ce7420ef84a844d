"""What requests for answers to a conversation may say."""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from server.api.completions import refused
from server.api.completions.schemas import MAX_LOGPROBS, ChoiceFields
from server.api.http.fields import Fields, refusal
from server.text.chat_template import RESERVED


class TextPart(Fields):
    type: Annotated[str, Field(pattern="^text$", description="Only text.")]
    text: str


class Message(Fields):
    """Anything else that it holds (`name`, ...) is passed on to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class TemplateFields(Fields):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = Field(
        True, description="Begin the answer after the last message; only for messages."
    )
    continue_final_message: bool | None = Field(
        False,
        description="Leave the last message open, to be gone on with; needs add_generation_prompt: false.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the chat template, by name."
    )

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise refusal(
                "continue_final_message", "needs add_generation_prompt: false, which is true by default"
            )
        taken = sorted(RESERVED & (self.chat_template_kwargs or {}).keys())
        if taken:
            raise refusal("chat_template_kwargs", f"may not set {', '.join(taken)}")
        return self


class ChatRequest(ChoiceFields, TemplateFields):
    """POST /v1/chat/completions."""

    no_ops = refused.CHAT

    messages: Messages
    max_tokens: int | None = Field(
        None, ge=0, le=2**31, description="Most tokens to generate; by default what the context has room for."
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="OpenAI's new name of it.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives at each token; needs logprobs."
    )

    @property
    def given_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) == 2:
            raise refusal(
                "max_completion_tokens",
                f"is another name of max_tokens, but they are {self.max_completion_tokens} and {self.max_tokens}",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "needs logprobs: true")
        return self
