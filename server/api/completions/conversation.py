"""From messages to a prompt's text: what clients send is made into what chat templates are written for."""

import asyncio
import json
from typing import Any, NoReturn

from server.api.completions.chat_schemas import Message, TemplateFields
from server.api.http.errors import APIError, echo
from server.api.serving.variants import Variant
from server.text.chat_template import ChatTemplate, TemplateRefusedError

REASONING = ("reasoning", "reasoning_content")
"""Two names of one field. Clients send either, templates read either."""


async def conversation(variant: Variant, messages: list[Message], fields: TemplateFields) -> str:
    """The text of messages by the model's chat template. 400 if it has none, or refuses them."""
    template = variant.text.chat_template
    if template is None:
        raise APIError(
            400,
            f"messages: model {variant.name!r} has no chat template; use /v1/completions",
            param="messages",
        )
    try:
        return await asyncio.to_thread(_render, template, messages, fields)
    except TemplateRefusedError as e:
        raise APIError(400, f"messages: {str(e)[:1000]}", param="messages") from e


def _render(template: ChatTemplate, messages: list[Message], fields: TemplateFields) -> str:
    return template.render(
        [_plain(message, f"messages[{at}]", template) for at, message in enumerate(messages)],
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=bool(fields.continue_final_message),
        variables=fields.chat_template_kwargs,
    )


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
