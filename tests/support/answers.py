"""What a model says, in each format of tool calls, and what must be read in it."""

import json
from collections.abc import Mapping
from typing import Any

from server.text.answers.formats import CALL_FORMATS
from server.text.answers.parts import Arguments, Call, Content, Part, Reasoning
from server.text.answers.reader import AnswerReader, Thinking

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}
TOOLS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}

Message = dict[str, Any]


def written(format_name: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as models of a format are taught to write them by their public templates."""
    if format_name == "hermes":
        return "\n".join(
            "<tool_call>\n"
            + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            + "\n</tool_call>"
            for name, arguments in calls
        )
    if format_name == "olmo3":
        lines = [
            f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in arguments.items())})"
            for name, arguments in calls
        ]
        return "<function_calls>" + "\n".join(lines) + "</function_calls>"
    texts = []
    for name, arguments in calls:
        text = f"<tool_call>\n<function={name}>\n"
        for key, value in arguments.items():
            plain = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
            text += f"<parameter={key}>\n{plain}\n</parameter>\n"
        texts.append(text + "</function>\n</tool_call>")
    return "\n".join(texts)


def reader(
    format_name: str | None,
    thinking: Thinking = Thinking.NEVER,
    tools: Mapping[str, dict[str, Any]] = TOOLS,
    **options: Any,
) -> AnswerReader:
    """A reader of answers in a format."""
    calls = None if format_name is None else CALL_FORMATS[format_name]
    return AnswerReader(thinking, calls, tools, **options)


def read(answer: AnswerReader, pieces: list[str], *, each: bool = True) -> list[Part]:
    """All parts of an answer that comes in pieces, taken after each piece or at the end."""
    parts: list[Part] = []
    for piece in pieces:
        answer.add(piece)
        if each:
            parts += answer.take()
    answer.end()
    return parts + answer.take()


def message(parts: list[Part]) -> Message:
    """The message that parts make."""
    calls: list[dict[str, str]] = []
    texts: dict[type, str] = {Content: "", Reasoning: ""}
    for part in parts:
        match part:
            case Call(number, name):
                assert number == len(calls)
                calls.append({"name": name, "arguments": ""})
            case Arguments(number, text):
                assert number == len(calls) - 1
                calls[number]["arguments"] += text
            case _:
                texts[type(part)] += part.text
    return {"content": texts[Content], "reasoning": texts[Reasoning], "calls": calls}
