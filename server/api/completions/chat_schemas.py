"""What requests for answers to a conversation may say."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from server.api.completions import refused
from server.api.completions.schemas import MAX_LOGPROBS, ChoiceFields
from server.api.http.fields import Fields, refusal
from server.text.answers.schemas import flaw_of
from server.text.chat_template import RESERVED

MAX_TOOLS = 256
"""Most tools of one request."""

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]+$", max_length=128, min_length=1)]


def _only_text(value: Any) -> Any:
    if value != "text":
        raise PydanticCustomError("refused", "only text is understood, no {kind}", {"kind": str(value)[:50]})
    return value


class TextPart(Fields):
    type: Annotated[Literal["text"], BeforeValidator(_only_text), Field(description="Only text.")]
    text: str


class Message(Fields):
    """Anything else that it holds (`name`, ...) is passed on to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None


class Function(Fields):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments.")
    strict: bool | None = Field(None, description="Keep the arguments of calls to the schema.")


class Tool(Fields):
    type: Literal["function"]
    function: Function

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """What its arguments are; nothing where that isn't said."""
        return self.function.parameters or {"type": "object", "properties": {}}


class FunctionName(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: FunctionName


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class TemplateFields(Fields):
    """How messages become a prompt."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="What the model may call."
    )
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

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return self.tools or []

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or []]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refusal("tools", f"has {twice!r} more than once")
        for tool in self.tools or []:
            schema = tool.schema_of_arguments
            if schema.get("type", "object") != "object":
                raise refusal("tools", f"{tool.function.name}: parameters must be the schema of an object")
            if (flaw := flaw_of(schema)) is not None:
                raise refusal("tools", f"{tool.function.name}: parameters: {flaw}")
        return self

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

    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None,
        description="Whether the model calls a tool: none, auto (what it likes; the default where there are tools), "
        "required, or a function by its name.",
    )
    parallel_tool_calls: bool | None = Field(True, description="Whether it may call more than one.")

    @property
    def offered(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else super().offered

    @property
    def demanded(self) -> list[Tool]:
        """The tools one of which must be called; none where the model may answer as it likes."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered if tool.function.name == name]
        return self.offered if self.tool_choice == "required" else []

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

    @model_validator(mode="after")
    def _check_tool_choice(self) -> Self:
        choice = self.tool_choice
        if choice in (None, "none", "auto") or self.demanded:
            return self
        if not self.tools:
            raise refusal("tool_choice", "needs tools")
        names = ", ".join(tool.function.name for tool in self.tools)
        raise refusal("tool_choice", f"names none of the tools, which are {names[:200]}")
