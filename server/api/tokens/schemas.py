"""What requests to tokenise may say, and what the answers to them look like in the OpenAPI document."""

from typing import Self

from pydantic import BaseModel, Field, model_validator

from server.api.completions.chat_schemas import Messages, TemplateFields
from server.api.completions.refused import RENDERING
from server.api.http.fields import CheckedFields, Fields, TokenIds, refusal


class TokenizeRequest(CheckedFields, TemplateFields):
    """POST /tokenize: a prompt, or messages through the chat template."""

    no_ops = RENDERING

    model: str | None = Field(None, max_length=256, description="The first variant if not given.")
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="As the tokenizer does by itself; default true for a prompt, false for messages."
    )
    return_token_strs: bool | None = Field(False, description="The vocabulary's entry of each token too.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "or messages: exactly one of them is needed")
        for field in ("tools", "continue_final_message", "chat_template_kwargs"):
            if self.messages is None and getattr(self, field):
                raise refusal(field, "needs messages, not a prompt")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=256, description="The first variant if not given.")
    tokens: TokenIds


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str
