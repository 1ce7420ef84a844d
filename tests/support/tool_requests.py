"""What tests of clients ask with: tools whose arguments a model of random weights can be held to, and messages."""

from typing import Any

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "Genf"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
HELLO = [{"role": "user", "content": "How is it in Bern?"}]
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
