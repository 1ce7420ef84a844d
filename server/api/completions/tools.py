"""How the answer to a conversation is read: for thoughts, and for calls of the tools that the request offers."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from server.api.completions.chat_schemas import ChatRequest, NamedTool, Tool
from server.api.completions.conversation import Rendered
from server.api.completions.structured import checked, constraint
from server.api.http.errors import APIError
from server.api.serving.variants import Variant
from server.text.answers.formats import CALL_FORMATS
from server.text.answers.grammars import behind_thoughts, demanded, kept
from server.text.answers.reader import AnswerReader, Thinking
from server.text.grammar import GrammarError


def reader_for(variant: Variant, body: ChatRequest, prompt: Rendered) -> Callable[[], AnswerReader] | None:
    """Makes a reader for each choice; None where the answer is text and nothing else. 400 if the model writes calls in
    a format that we don't know. The variant has loaded."""
    thinking = Thinking.NEVER if variant.text.reasoning_format is None else prompt.thinking
    name = variant.text.call_format
    if name is None and body.offered and (body.demanded or not variant.text.reads_no_calls):
        field = "tool_choice" if body.demanded else "tools"
        raise APIError(
            400,
            f"{field}: the format in which model {variant.name!r} calls tools is not known; the server's setting "
            f"variants.{variant.name}.tool_call_parser names one of {', '.join(CALL_FORMATS)}, or none, by which calls "
            "stay text",
            param=field,
        )
    calls = CALL_FORMATS[name] if name is not None and body.offered else None
    if thinking is Thinking.NEVER and calls is None:
        return None
    return partial(AnswerReader, thinking, calls, _by_name(body.offered), parallel=_parallel(body))


async def grammar_for(variant: Variant, body: ChatRequest, prompt: Rendered) -> str:
    """What the answer is held to: calls that are demanded or strict, or what other fields ask for; empty for nothing.
    What the model thinks before is held to nothing. `reader_for` has found the body good.

    Raises:
        APIError: 400, this can't be kept.
    """
    tokenizer = variant.text.tokenizer
    thinking = prompt.thinking if variant.text.reasoning_format is not None else Thinking.NEVER
    if body.wanted and body.offered:
        field = body.wanted[0].param
        message = f"{field}: holds the whole answer to a form, so that no tool can be called; needs tool_choice: none"
        raise APIError(400, message, param=field)
    strict = any(tool.function.strict for tool in body.offered)
    name = variant.text.call_format
    if name is None and strict:
        message = f"tools: strict can't be kept: calls of model {variant.name!r} stay text (tool_call_parser is none)"
        raise APIError(400, message, param="tools")
    if name is None or not (body.demanded or strict):
        form = await constraint(body)
        return behind_thoughts(form, thinking, tokenizer) if form else ""
    make = demanded if body.demanded else kept
    tools = _by_name(body.demanded or body.offered)
    try:
        text = await asyncio.to_thread(make, CALL_FORMATS[name], tools, tokenizer, parallel=_parallel(body))
    except (GrammarError, RecursionError) as e:
        raise APIError(400, f"tools: {e}", param="tools") from e
    if text is None:
        message = (
            f"tools: strict can't be kept where the model is free to call none, because {CALL_FORMATS[name].opening} "
            f"is no token of model {variant.name!r}; needs tool_choice: required"
        )
        raise APIError(400, message, param="tools")
    return behind_thoughts(await checked(text, param="tools"), thinking, tokenizer)


def _by_name(tools: list[Tool]) -> dict[str, dict[str, Any]]:
    return {tool.function.name: tool.schema_of_arguments for tool in tools}


def _parallel(body: ChatRequest) -> bool:
    """Whether there may be more than one call. One that is demanded by its name is one."""
    return body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
