"""Which format a model writes calls in, and whether it thinks: told by its chat template, or by name."""

import re

from server.text.answers.hermes import Hermes
from server.text.answers.olmo3 import Olmo3
from server.text.answers.parts import CallFormat
from server.text.answers.qwen3_coder import Qwen3Coder

CALL_FORMATS: dict[str, CallFormat] = {
    "qwen3_coder": Qwen3Coder(),
    "qwen3_xml": Qwen3Coder(),
    "hermes": Hermes(),
    "olmo3": Olmo3(),
}
"""Formats of tool calls by the names that vLLM gives to their parsers, two of them to one."""
REASONING_FORMATS = ("qwen3", "olmo3")
"""Formats of thoughts likewise: all of these are `<think>...</think>`."""


def call_format_in(template: str) -> str | None:
    """The format of calls that a template writes; None if it is none that we know."""
    signs = (("<function=", "qwen3_coder"), ("<tool_call>", "hermes"), ("<function_calls>", "olmo3"))
    return next((name for sign, name in signs if sign in template), None)


def reasoning_format_in(template: str) -> str | None:
    """The format of thoughts that a template writes; None if it writes none."""
    if "</think>" not in template and "<think>" not in template:
        return None
    return "olmo3" if "<function_calls>" in template else "qwen3"


def takes_tools(template: str) -> bool:
    """Whether a template does anything with tools."""
    return re.search(r"\btools\b", template) is not None
