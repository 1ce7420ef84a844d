"""What reaches the chat template, and what is made of it: tool calls, contents, a message to continue, failures."""

import json
import threading

import pytest
from checkpoints import byte_tokenizer
from scripted import SCRIPTS
from transformers.utils.chat_template_utils import render_jinja_template

from server.api.http import bodies
from server.text import chat_template
from server.text.chat_template import ChatTemplate, TemplateRefusedError

TOKENIZER = byte_tokenizer()
HELLO = {"role": "user", "content": "Hello"}

# In the manner of Qwen's: thoughts apart, tool calls as JSON, answers of tools as a user's message.
CALLS = """{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.reasoning_content %}{{ '\\n<think>' ~ message.reasoning_content ~ '</think>' }}{% endif %}
        {%- if content %}{{ '\\n' + content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# In the manner of Llama's: contents are trimmed, and arguments are written one by one.
TRIMS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>' }}
    {%- if 'tool_calls' in message %}
        {%- for name, value in message.tool_calls[0].function.arguments | items %}{{ name ~ '=' ~ value }}{% endfor %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}"""

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A{% endif %}"

# In the manner of models that see images: content in parts, some of them know nothing else.
PARTS = """{% for m in messages %}<{{ m.role }}>{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }};{% endif %}{% endfor %}{% endfor %}"""
EITHER = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""


@pytest.fixture
def rendered(api, monkeypatch):
    """The prompt that messages become by a template, in chat and in /tokenize alike; or the error's message."""
    variant = api.app.state.service.variants.get("dense")

    def render(source, *messages, **fields):
        monkeypatch.setattr(variant.text, "chat_template", ChatTemplate(source, {"bos_token": "<s>"}))
        body = json.dumps({"model": "dense", "messages": messages, **fields})
        chat, tokens = (
            api.post(path, content=body, headers={"content-type": "application/json"})
            for path in ("/v1/chat/completions", "/tokenize")
        )
        assert chat.status_code == tokens.status_code, (chat.text, tokens.text)
        if chat.status_code != 200:
            assert chat.status_code == 400 and chat.json() == tokens.json()
            return chat.json()["error"]
        ids = SCRIPTS["dense"].seen[-1].token_ids
        assert ids == tokens.json()["tokens"]
        return TOKENIZER.decode(ids, skip_special_tokens=False)

    return render


def call(arguments, **fields):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}


ABSENT = {"role": "assistant"}
NULL = {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None}


@pytest.mark.parametrize("source", [CALLS, TRIMS, PLAIN, EITHER, PARTS])
@pytest.mark.parametrize("message", [ABSENT, NULL])
def test_no_content_is_no_word(rendered, source, message):
    text = rendered(source, HELLO, message)
    assert "None" not in text and text.index("Hello") < text.index("assistant")
    with_calls = rendered(source, HELLO, {**message, "tool_calls": [call('{"a": "b"}')]})
    assert "None" not in with_calls


def test_what_is_null_is_not_there(rendered):
    source = "{% for m in messages %}{{ m.content }}{{ m.keys() | sort | join(',') }}{% endfor %}"
    assert (
        rendered(source, HELLO, {**NULL, "tool_calls": None, "name": "n"})
        == "Hellocontent,rolecontent,name,role"
    )
    assert rendered(source, HELLO, {"role": "assistant", "content": "", "tool_calls": []}).endswith(
        ",rolecontent,role"
    )


def test_arguments_are_an_object(rendered):
    expected = (
        '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich", "n": [1, 2.5, null]}}\n</tool_call>'
    )
    arguments = {"city": "Zürich", "n": [1, 2.5, None]}
    for given in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=1), arguments):
        text = rendered(CALLS, HELLO, {**NULL, "tool_calls": [call(given)]}, {"role": "tool", "content": "9"})
        assert expected in text and "<|im_start|>tool\n9<" in text
    assert "<|end|>city=Zürichn=[" in rendered(
        TRIMS, HELLO, {**NULL, "tool_calls": [call(json.dumps(arguments))]}
    )
    # As vLLM takes them.
    nothing = {"type": "function", "function": {"name": "f"}}
    for empty in (call(""), call(None), call("{}"), call({}), nothing):
        assert '"arguments": {}}' in rendered(CALLS, HELLO, {**ABSENT, "tool_calls": [empty]})


@pytest.mark.parametrize(
    "arguments",
    [
        "{",
        "nonsense",
        "[]",
        '"text"',
        "5",
        "null",
        " ",
        '{"a": NaN}',
        '{"a": 1} x',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 20_000,
        5,
        [1],
        True,
    ],
    ids=lambda x: repr(x)[:12],
)
def test_arguments_that_are_no_object_are_named(rendered, arguments):
    messages = (HELLO, {**NULL, "tool_calls": [call("{}"), call(arguments)]})
    error = rendered(CALLS, *messages)
    assert error["param"] == "messages" and len(error["message"]) < 400
    assert error["message"].startswith("messages[1].tool_calls[1].function.arguments: must be a JSON object")


@pytest.mark.parametrize(
    ("calls", "where"),
    [
        ("f()", "messages[0].tool_calls: must be a list"),
        ({"function": {}}, "messages[0].tool_calls: must be a list"),
        (["f"], "messages[0].tool_calls[0]: must be an object"),
        ([{"type": "function"}], "messages[0].tool_calls[0].function: must be an object"),
        ([call("{}"), {"function": "f"}], "messages[0].tool_calls[1].function: must be an object"),
    ],
)
def test_tool_calls_of_another_shape_are_named(rendered, calls, where):
    assert rendered(CALLS, {**NULL, "tool_calls": calls})["message"].startswith(where)


def test_arguments_are_read_up_to_a_size(rendered):
    most = bodies.MAX_VALUES - 100
    arguments = json.dumps({"a": [1] * most})
    source = "{{ messages[0].tool_calls[0].function.arguments.a | length }}"
    assert rendered(source, {**NULL, "tool_calls": [call(arguments)]}) == str(most)
    arguments = json.dumps({"a": [1] * bodies.MAX_VALUES})
    message = rendered(CALLS, {**NULL, "tool_calls": [call(arguments)]})["message"]
    assert "50000 entries" in message and len(message) < 400


def test_half_a_character_in_arguments_is_refused(rendered):
    for arguments in ('{"a": "\\ud800"}', {"a": "\ud800"}):
        assert "surrogate" in rendered(CALLS, {**NULL, "tool_calls": [call(arguments)]})["message"]


def test_reasoning_has_two_names(rendered):
    for name in ("reasoning", "reasoning_content"):
        text = rendered(CALLS, HELLO, {"role": "assistant", "content": "Hi", name: "hm"})
        assert "assistant\n<think>hm</think>\nHi<" in text
    both = "{% for m in messages %}{{ m.reasoning }}|{{ m.reasoning_content }}{% endfor %}"
    assert rendered(both, {**ABSENT, "reasoning": "a"}) == "a|a"
    assert rendered(both, {**HELLO, "reasoning": "a"}) == "a|"


def test_content_is_given_as_the_template_takes_it(rendered):
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    assert rendered(PLAIN, HELLO, parts) == "<user>Hello\n<user>one\ntwo\nA"
    assert rendered(PARTS, HELLO, parts) == "<user>Hello;<user>one;two;"
    assert rendered(EITHER, HELLO, parts) == "<user>Hello<user>onetwo"
    assert rendered(PARTS, {"role": "system", "content": []}, HELLO) == "<system><user>Hello;"


CONTINUED = ["Sure", " Sure", "Sure ", "Sure\n\n", "\tSure, here:\n ", "Hello", "a b", "é漢", "", " "]


@pytest.mark.parametrize("source", [CALLS, TRIMS, PLAIN, EITHER])
@pytest.mark.parametrize("content", CONTINUED, ids=repr)
def test_a_message_is_continued_as_transformers_does(rendered, source, content):
    messages = [HELLO, {"role": "assistant", "content": content}]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, bos_token="<s>"
    )
    text = rendered(source, *messages, continue_final_message=True, add_generation_prompt=False)
    assert text == expected and text.rstrip().endswith(content.strip())


def test_parts_are_continued(rendered):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert rendered(EITHER, HELLO, {"role": "assistant", "content": parts}, **fields).endswith(
        "<assistant>onetwo "
    )
    assert (
        rendered(PARTS, HELLO, {"role": "assistant", "content": "One"}, **fields)
        == "<user>Hello;<assistant>One"
    )
    assert rendered(PLAIN, HELLO, {"role": "assistant", "content": parts}, **fields).endswith(
        "<assistant>one\ntwo "
    )


def test_what_can_not_be_continued_is_refused(rendered):
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    answer = {"role": "assistant", "content": "Sure"}
    for generation in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": None}):
        error = rendered(PLAIN, HELLO, answer, continue_final_message=True, **generation)
        assert (
            error["param"] == "continue_final_message" and "add_generation_prompt: false" in error["message"]
        )
    for nothing in (ABSENT, NULL):  # an empty one, as everywhere
        assert rendered(PLAIN, HELLO, nothing, **fields) == "<user>Hello\n<assistant>"
    assert "no content" in rendered(PARTS, HELLO, {"role": "assistant", "content": []}, **fields)["message"]
    for source in (
        "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content | truncate(9) }}{% endfor %}",
    ):
        assert (
            "does not write the last message as it is" in rendered(source, HELLO, answer, **fields)["message"]
        )
    # Nobody knows the mark, so a message can't move the place of the cut.
    forged = {"role": "assistant", "content": "CONTINUE_FINAL_MESSAGE_TAG Sure"}
    assert rendered(PLAIN, HELLO, forged, **fields).endswith("<assistant>CONTINUE_FINAL_MESSAGE_TAG Sure")


def test_the_generation_prompt_can_be_left_out(rendered):
    assert rendered(PLAIN, HELLO) == rendered(PLAIN, HELLO, add_generation_prompt=None) == "<user>Hello\nA"
    assert rendered(PLAIN, HELLO, add_generation_prompt=False) == "<user>Hello\n"


def test_variables_of_the_template(rendered):
    assert rendered(CALLS, HELLO).endswith("assistant\n")
    assert rendered(CALLS, HELLO, chat_template_kwargs={"enable_thinking": True}).endswith("assistant\n")
    text = rendered(CALLS, HELLO, chat_template_kwargs={"enable_thinking": False})
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    source = "{{ a.b[1] }} {{ bos_token }} {{ messages[0].content }}"
    assert (
        rendered(source, HELLO, chat_template_kwargs={"a": {"b": [1, "x"]}, "bos_token": "!"}) == "x ! Hello"
    )
    assert rendered(source, HELLO, chat_template_kwargs={"a": {"b": [1, 2]}}) == "2 <s> Hello"
    for nothing in (None, {}):
        assert rendered(PLAIN, HELLO, chat_template_kwargs=nothing) == "<user>Hello\nA"


@pytest.mark.parametrize("name", sorted(chat_template.RESERVED))
def test_variables_do_not_replace_what_is_the_servers(rendered, name):
    error = rendered(PLAIN, HELLO, chat_template_kwargs={"a": 1, name: []})
    assert error["param"] == "chat_template_kwargs" and name in error["message"]


def test_no_function_of_the_template_is_forgotten():
    functions = ChatTemplate("", {})._environment.globals.keys()
    assert functions <= chat_template.RESERVED and "raise_exception" in functions


@pytest.mark.parametrize("value", ["x", [1], 5, True])
def test_variables_that_are_none_are_refused(rendered, value):
    assert rendered(PLAIN, HELLO, chat_template_kwargs=value)["param"] == "chat_template_kwargs"


FAILING = {
    "{{ raise_exception('Roles must alternate') }}": "Roles must alternate",
    "{{ raise_exception('\\ud800') }}": "\\ud800",
    "{{ messages.pop() }}": "unsafe",
    "{{ messages[0].content[9:10].join([1]) }}": "expected str",
    "{{ '{}'.format() }}": "index",
    "{{ [].pop() }}": "unsafe",
    "{{ (messages | map(attribute='content') | list | first).index('z') }}": "substring not found",
    "{{ '%d' % 'x' }}": "%d format",
    "{{ strftime_now(5) }}": "strftime",
    "{{ 9 ** (9 ** 9) }}": "too large",
    "{{ 'x' * 10 ** 12 }}": "too large",
    "{{ 10 ** 12 * [1] }}": "too large",
    "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}": "too large",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "recursion",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": "steps",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}": "steps",
    "{% for i in range(9999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}": "steps",
    "{% for i in range(9999) %}{{ messages[0].content * 999 }}{% endfor %}": "characters",
    "{{ messages[0].content.encode('utf-16')[:3].decode() }}": "codec can't decode",
    "{{ messages | map('nothing') | list }}": "nothing",
}


@pytest.mark.parametrize("source", FAILING)
def test_whatever_a_template_raises_is_its_message(rendered, source, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_STEPS", 20_000)
    error = rendered(source, HELLO)
    assert error["param"] == "messages" and len(error["message"]) < 1100
    assert error["message"].startswith("messages: the model's chat template refuses these messages: ")
    assert FAILING[source] in error["message"]


@pytest.mark.parametrize(
    "error", [IndexError("pop"), RecursionError("deep"), MemoryError(), AssertionError()]
)
def test_any_exception_is_a_refusal(error, monkeypatch):
    def fail(message):
        raise error

    template = ChatTemplate("{{ raise_exception('x') }}", {})
    monkeypatch.setitem(template._environment.globals, "raise_exception", fail)
    with pytest.raises(TemplateRefusedError, match=str(error) or type(error).__name__):
        template.render([HELLO], add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    ["{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "{{ " + "(" * 9999, "{{ 1" + "+1" * 9999 + " }}"],
)
def test_a_source_that_python_can_not_compile_is_no_template(source):
    with pytest.raises(TemplateRefusedError, match="no good"):
        ChatTemplate(source, {})


def test_a_counted_loop_writes_what_it_always_wrote():
    source = """{% for m in messages if m.role != 'x' %}
{{ loop.index }}{{ m.content }}
    {%- for c in m.content recursive %}{{ c }}{% endfor %}
{% else %}none{% endfor %}{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f(1) }}{{ f(2) }}"""
    for messages in ([HELLO, HELLO], [{**HELLO, "role": "x"}]):
        (expected,), _ = render_jinja_template([messages], chat_template=source)
        assert ChatTemplate(source, {}).render(messages, add_generation_prompt=False) == expected


def test_a_long_conversation_is_rendered_whole():
    template = ChatTemplate(CALLS, {})
    messages = [
        HELLO,
        {"role": "assistant", "content": "x" * 1000, "tool_calls": [call({"a": 1})] * 3},
    ] * 2048
    text = template.render(messages, add_generation_prompt=True)
    assert text.count("<tool_call>") == 3 * 2048 and len(text) < chat_template.MAX_CHARACTERS


def test_conversations_are_rendered_off_the_event_loop(rendered, monkeypatch):
    threads = set()
    render = ChatTemplate._render

    def watched(self, *args):
        threads.add(threading.current_thread())
        return render(self, *args)

    monkeypatch.setattr(ChatTemplate, "_render", watched)
    rendered(CALLS, HELLO, {**NULL, "tool_calls": [call("{}")]})
    assert threads and all(thread.name.startswith("asyncio_") for thread in threads)
