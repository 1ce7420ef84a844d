"""Chat templates: messages -> the text that the model was trained on, by the checkpoint's own Jinja template.

A template comes with a checkpoint, which may come from anywhere: it runs in Jinja's immutable sandbox, with the
names that `transformers` gives to templates (`apply_chat_template`).
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateRefusedError(Exception):
    """The template can't be used, or has no use for these messages; the message says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is plain text."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


class ChatTemplate:
    """One checkpoint's template, compiled.

    Args:
        source: Jinja text.
        special_tokens: `bos_token`, `eos_token` and so on, as the template names them.

    Raises:
        TemplateRefusedError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise, "strftime_now": _strftime_now}
        environment.globals.update(functions)
        self.source = source
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise TemplateRefusedError(f"the model's chat template is no good: {e}") from e

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation, up to where the assistant's answer begins if that is asked for.

        Raises:
            TemplateRefusedError: the template has no use for these messages (an unknown role, a wrong order).
        """
        try:
            text = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
            text.encode()  # JSON may hold half a surrogate pair, which no tokenizer takes
            return text
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
            # A template is code: over content that it did not expect it may fail in any of these ways.
            raise TemplateRefusedError(f"the model's chat template refuses these messages: {e}") from e


def read_tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the template of `chat_template.jinja` in its place if there is one."""
    config: dict[str, Any] = {}
    file = checkpoint / "tokenizer_config.json"
    if file.exists():
        config = json.loads(file.read_text("utf-8"))
    template = checkpoint / "chat_template.jinja"
    if template.exists():
        config["chat_template"] = template.read_text("utf-8")
    return config


def template_of(config: dict[str, Any]) -> str | None:
    """The template that a tokenizer's config names; of several, the one called `default`."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def special_tokens_of(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` -> its text and so on; an entry is a text or an added token's table."""
    found: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found
