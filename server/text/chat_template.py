"""Chat templates: messages -> the text that the model was trained on, by the checkpoint's own Jinja template.

A template comes with a checkpoint, which may come from anywhere: it runs in Jinja's immutable sandbox, with the
names that `transformers` gives to templates (`apply_chat_template`).
"""

import json
import os
import secrets
import threading
from collections.abc import Mapping, Sized
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.defaults
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lowkey.words import writable

MAX_CHARACTERS = 2**24
"""A rendering is given up when it is longer: four times the largest body that is let in by default."""
MAX_STEPS = 200_000
"""A rendering is given up after so many rounds of its loops and calls of its macros."""

PROBE = "Is this\nwritten?"
"""What a template is tried with. It has a line break, which is lost where a list is written as Python shows it."""

MAX_BITS = 2**16
"""Most bits of a number that a template computes."""

Conversation = list[dict[str, Any]]


class TemplateRefusedError(Exception):
    """The template can't be used, or has no use for these messages; the message says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is plain text."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with limits on loops and on products.

    The sandbox stops nobody from nesting loops, and a rendering can't be interrupted from outside. So each round of a
    loop, each item that a loop's condition looks at and each call of a macro is counted.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self._rendering = threading.local()
        self.filters["tojson"] = _tojson
        self.tests["counted"] = self._step
        self.globals.update(raise_exception=_raise, strftime_now=_strftime_now)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """A product or a power, unless it would take all memory, or all day."""
        size, most = 0, MAX_CHARACTERS
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            size, most = bits * right if operator == "**" else bits + right.bit_length(), MAX_BITS
        elif isinstance(left, int) and isinstance(right, Sized):
            size = left * len(right)
        elif isinstance(right, int) and isinstance(left, Sized):
            size = right * len(left)
        if size > most:
            raise jinja2.TemplateError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)

    def begin(self) -> None:
        """A rendering begins, in this thread."""
        self._rendering.steps = 0

    @jinja2.pass_context  # else Jinja would compute it once, when the template is compiled
    def _step(self, _: jinja2.runtime.Context, value: bool) -> bool:
        """Count one step of the rendering. A test, because tests are called directly, functions through the sandbox."""
        self._rendering.steps += 1
        if self._rendering.steps > MAX_STEPS:
            raise jinja2.TemplateError(f"takes more than {MAX_STEPS} steps")
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        step = nodes.Test(nodes.Const(True), "counted", [], [], None, None)
        for loop in tree.find_all(nodes.For):
            loop.body.insert(0, nodes.ExprStmt(step))
            if loop.test is not None:
                loop.test = nodes.And(step, loop.test)
        for macro in tree.find_all(nodes.Macro):
            macro.body.insert(0, nodes.ExprStmt(step))
        tree.set_lineno(1)
        return tree


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
    }
    | jinja2.defaults.DEFAULT_NAMESPACE.keys()
    | {"raise_exception", "strftime_now"}
)
"""Names that a request's own variables may not take: what `transformers` takes for itself, and the functions."""


class ChatTemplate:
    """One checkpoint's template, compiled.

    Args:
        source: Jinja text.
        special_tokens: `bos_token`, `eos_token` and so on, as the template names them.

    Raises:
        TemplateRefusedError: the source is no template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as e:  # Jinja's own errors, and Python's over what it has made of the source
            raise TemplateRefusedError(f"the model's chat template is no good: {_reason(e)}") from e

    @cached_property
    def takes(self) -> tuple[bool, bool]:
        """Whether it writes content that is a text, and whether it writes a list of text parts as it would a text.
        Templates of models that see images may know parts only. Found out by rendering, so not on the event loop."""
        text, part = self._probe(PROBE), self._probe([{"type": "text", "text": PROBE}])
        return text is not None or part is None, part is not None and text in (None, part)

    def _probe(self, content: Any) -> str | None:
        """How a message with the probe as its content is written; None if the probe is not."""
        try:
            text = self._render([{"role": "user", "content": content}], {})
        except TemplateRefusedError:
            return None
        return text if PROBE in text else None

    def render(
        self,
        messages: Conversation,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, up to where the assistant's answer begins if that is asked for.

        Args:
            messages: each with its `content`, a text or text parts, as `takes` says.
            tools: what the model may call, in OpenAI's form; None for nothing.
            continue_final_message: end right behind the last message's content instead.
            variables: more variables of the template, none of them `RESERVED`; they go before the special tokens.

        Raises:
            TemplateRefusedError: the template has no use for these messages (an unknown role, a wrong order), renders
                more than `MAX_CHARACTERS` or takes more than `MAX_STEPS`, or does not write the message to continue.
        """
        given = {**(variables or {}), "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self._continued(messages, given) if continue_final_message else self._render(messages, given)

    def _continued(self, messages: Conversation, variables: dict[str, Any]) -> str:
        """The rendering up to a mark that stands behind the last content. The space behind the mark is gone if the
        template trims contents: then white space before the mark would have been trimmed as well."""
        mark = secrets.token_hex(16)
        *before, last = messages
        content = last.get("content")
        marked: Any
        if isinstance(content, str):
            text, marked = content, f"{content}{mark} "
        elif isinstance(content, list) and content:
            text = content[-1]["text"]
            marked = [*content[:-1], {**content[-1], "text": f"{text}{mark} "}]
        else:
            raise TemplateRefusedError("the last message has no content to continue")
        rendered = self._render([*before, {**last, "content": marked}], variables)
        written, found, after = rendered.rpartition(mark)
        if not after.startswith(" "):
            written = written.rstrip()
        if not found or not written.rstrip().endswith(text.strip()):
            raise TemplateRefusedError("the model's chat template does not write the last message as it is")
        return written

    def _render(self, messages: Conversation, variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        self._environment.begin()
        try:
            for piece in self._template.generate(
                {"tools": None, "documents": None, **self._special_tokens, **variables, "messages": messages}
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise jinja2.TemplateError(f"renders more than {MAX_CHARACTERS} characters")
            text = "".join(pieces)
            text.encode()  # JSON may hold half a surrogate pair, which no tokenizer takes
            return text
        except Exception as e:  # a template is code, and may fail in any way
            reason = f"the model's chat template refuses these messages: {_reason(e)}"
            raise TemplateRefusedError(reason) from e


def _reason(error: Exception) -> str:
    """An error's message as text that can be sent: some have none, and some quote half a surrogate pair."""
    return writable(str(error) or type(error).__name__)


def read_tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the template of `chat_template.jinja` in its place if there is one.

    Raises:
        OSError: one of the files is there and can't be read.
        ValueError: it is no JSON object, or no UTF-8.
    """
    config: dict[str, Any] = {}
    file = checkpoint / "tokenizer_config.json"
    text = _text(file)
    if text is not None:
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{file} is not JSON: {e}") from e
        if not isinstance(config, dict):
            raise ValueError(f"{file} must be a JSON object, got {type(config).__name__}")
    template = _text(checkpoint / "chat_template.jinja")
    if template is not None:
        config["chat_template"] = template
    return config


def _text(file: Path) -> str | None:
    """The text of a file; None if it is not there. A link that leads nowhere is a file that can't be read."""
    if not os.path.lexists(file):
        return None
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8: {e}") from e


def template_of(config: dict[str, Any]) -> str | None:
    """The template that a tokenizer's config names; of several, the one called `default`."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def special_tokens_of(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` -> its text and so on; an entry is a text or an added token's table."""
    found: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found
