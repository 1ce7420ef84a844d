"""From messages to a prompt's text: what clients send is made into what chat templates are written for."""

import asyncio
import json
from typing import Any, NamedTuple, NoReturn

from server.api.completions.chat_schemas import Message, TemplateFields, Tool
from server.api.http.errors import APIError, echo
from server.api.serving.variants import Variant
from server.text.answers.formats import takes_tools
from server.text.answers.reader import END_THINK, THINK, Thinking
from server.text.chat_template import ChatTemplate, TemplateRefusedError

REASONING = ("reasoning", "reasoning_content")
"""Two names of one field. Clients send either, templates read either."""


class Rendered(NamedTuple):
    """A conversation as the model is given it."""

    text: str
    thinking: Thinking
    """Whether the answer begins within thoughts, if the model writes any."""


async def conversation(variant: Variant, messages: list[Message], fields: TemplateFields) -> Rendered:
    """Messages by the model's chat template. 400 if it has none, or refuses them, or has no use for the tools."""
    template = variant.text.chat_template
    if template is None:
        raise APIError(
            400,
            f"messages: model {variant.name!r} has no chat template; use /v1/completions",
            param="messages",
        )
    if fields.offered and not takes_tools(template.source):
        message = f"tools: the chat template of model {variant.name!r} has no place for tools"
        raise APIError(400, message, param="tools")
    try:
        text = await asyncio.to_thread(_render, template, messages, fields)
    except TemplateRefusedError as e:
        raise APIError(400, f"messages: {str(e)[:1000]}", param="messages") from e

    return Rendered(text, _thinking(text, messages, fields))


def _thinking(text: str, messages: list[Message], fields: TemplateFields) -> Thinking:
    """Whether the answer to a rendered conversation begins within thoughts."""
    if fields.continue_final_message:
        content = messages[-1].content or ""
        last = content if isinstance(content, str) else "".join(part.text for part in content)
        return Thinking.OPEN if last.rfind(THINK) > last.rfind(END_THINK) else Thinking.NEVER
    if fields.add_generation_prompt is not False:
        end = text[-1000:].rstrip()
        if end.endswith(THINK):
            return Thinking.OPEN
        if end.endswith(END_THINK):
            return Thinking.NEVER
    return Thinking.MAYBE


def _render(template: ChatTemplate, messages: list[Message], fields: TemplateFields) -> str:
    return template.render(
        [_plain(message, f"messages[{at}]", template) for at, message in enumerate(messages)],
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=bool(fields.continue_final_message),
        tools=[_tool(tool) for tool in fields.offered] or None,
        variables=fields.chat_template_kwargs,
    )


def _tool(tool: Tool) -> dict[str, Any]:
    """A tool as templates expect it, and as models were trained on: what is null is left out, and so is `strict`."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    return {"type": tool.type, "function": function}


def _plain(message: Message, where: str, template: ChatTemplate) -> dict[str, Any]:
    """A message as templates expect it, and as vLLM gives it to them. What is null is left out. A content that
    is null becomes an empty text, because many templates would write the word None."""
    fields = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
    if message.role == "assistant":
        reasoning = next((fields[name] for name in REASONING if name in fields), None)
        if reasoning is not None:
            fields.update(dict.fromkeys(REASONING, reasoning))
    if "tool_calls" in fields:
        calls = fields.pop("tool_calls")
        if not isinstance(calls, list):
            _refuse(f"{where}.tool_calls", "must be a list", calls)
        if calls:  # to many templates an empty list means that there are calls
            fields["tool_calls"] = [_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return {"role": message.role, "content": _content(message, template), **fields}


def _content(message: Message, template: ChatTemplate) -> str | list[dict[str, str]]:
    takes_text, takes_parts = template.takes
    if isinstance(message.content, list):
        if takes_parts:
            return [{"type": "text", "text": part.text} for part in message.content]
        return "\n".join(part.text for part in message.content)
    text = message.content or ""
    return text if takes_text else [{"type": "text", "text": text}]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object: clients send them as JSON in a text, which a template that writes
    them as JSON would encode once more."""
    if not isinstance(call, dict):
        _refuse(where, "must be an object", call)
    function = call.get("function")
    if not isinstance(function, dict):
        _refuse(f"{where}.function", "must be an object", function)
    return {
        **call,
        "function": {**function, "arguments": _arguments(function, f"{where}.function.arguments")},
    }


def _arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    given = function.get("arguments")
    parsed: Any = given
    if given is None or given == "":
        parsed = {}
    elif isinstance(given, str):
        try:  # their size is bounded with that of the body (`bodies.MAX_VALUES`)
            parsed = json.loads(given, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, dict):
        _refuse(where, "must be a JSON object, or the text of one", given)
    return parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse(where: str, text: str, value: Any) -> NoReturn:
    raise APIError(400, f"{where}: {text}, got {echo(value)}", param="messages")
