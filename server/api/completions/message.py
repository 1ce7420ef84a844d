"""The parts of an answer as OpenAI's chat has them: a message, and the deltas that it comes in."""

import secrets
from collections.abc import Sequence
from typing import Any

from server.api.completions.generation import Chunk
from server.text.answers.parts import Arguments, Call, Content, Part, Reasoning


def message(chunk: Chunk) -> dict[str, Any]:
    """The message that a whole choice is. Thoughts have both names that clients read them by, if there are any."""
    content = chunk.text + _joined(chunk.parts, Content)
    reasoning = _joined(chunk.parts, Reasoning)
    calls: list[dict[str, Any]] = []
    pieces: list[list[str]] = []
    for part in chunk.parts:
        if isinstance(part, Call):
            calls.append(_call(part.name))
            pieces.append([])
        elif isinstance(part, Arguments):
            pieces[part.number].append(part.text)
    for call, arguments in zip(calls, pieces, strict=True):
        call["function"]["arguments"] = "".join(arguments)
    return {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
        **(_thoughts(reasoning) if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def delta(chunk: Chunk) -> dict[str, Any]:
    """What an event of a stream adds to the message: text, or one part."""
    if not chunk.parts:
        return {"content": chunk.text}
    (part,) = chunk.parts
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return dict(_thoughts(text))
        case Call(number, name):
            return {"tool_calls": [{"index": number, **_call(name)}]}
        case Arguments(number, text):
            return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}


def _joined(parts: Sequence[Part], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def _thoughts(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}


def _call(name: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": ""},
    }
