"""Chat: the checkpoint's template in a sandbox, and OpenAI's shape around what the model says."""

import json
from pathlib import Path

import jinja2
import pytest
from checkpoints import byte_tokenizer
from scripted import CONTEXT
from tokenizers import processors

from server.api.completions.answer_schemas import ChatCompletion
from server.text.chat_template import (
    ChatTemplate,
    TemplateRefusedError,
    read_tokenizer_config,
    special_tokens_of,
    template_of,
)

TOKENIZER = byte_tokenizer()
HELLO = [{"role": "user", "content": "Hello"}]


def post(api, **fields):
    return api.post(
        "/v1/chat/completions", json={"model": "dense", "messages": HELLO, "max_tokens": 6, **fields}
    )


def chat(api, **fields):
    response = post(api, **fields)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json(), extra="forbid")
    return response.json()


def refused(response, param, *mentions):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    for mention in mentions:
        assert mention in error["message"]


def sent(script):
    return TOKENIZER.decode(script.seen[-1].token_ids, skip_special_tokens=False)


def test_messages_go_through_the_template(api, script):
    script.queue.append([*TOKENIZER.encode("Hey").ids, 0])
    body = chat(api, messages=[{"role": "system", "content": "Be brief"}, *HELLO])
    assert sent(script) == "<system>Be brief<|endoftext|>\n<user>Hello<|endoftext|>\n<assistant>"
    assert script.seen[-1].token_ids.count(0) == 2, "the template's end of text is one token"
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hey", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["usage"]["prompt_tokens"] == len(script.seen[-1].token_ids)
    assert body["usage"]["completion_tokens"] == 4 and body["lowkey"]["variant"] == "dense"


def test_the_template_alone_says_which_special_tokens_there_are(api, script, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    monkeypatch.setattr(api.app.state.service.variants.get("dense").text, "tokenizer", tokenizer)
    chat(api)
    assert sent(script) == "<user>Hello<|endoftext|>\n<assistant>"


def test_content_in_parts_is_text(api, script):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(api, messages=[{"role": "user", "content": parts}])
    assert "<user>one\ntwo<" in sent(script)
    chat(api, messages=[*HELLO, {"role": "assistant", "content": None}])


def test_a_stream_begins_with_the_role(api, script):
    text = "aé b"
    script.queue += [TOKENIZER.encode(text).ids] * 2
    fields = {"max_tokens": len(TOKENIZER.encode(text).ids), "logprobs": True, "top_logprobs": 2}
    whole = chat(api, **fields)["choices"][0]
    response = post(api, **fields, stream=True, stream_options={"include_usage": True})
    blocks = [b.removeprefix("data: ") for b in response.text.split("\n\n")]
    assert blocks[-2:] == ["[DONE]", ""]
    chunks = [json.loads(b) for b in blocks[:-2]]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [c["choices"][0]["delta"] for c in chunks[1:-1]]
    assert [d.get("content") for d in deltas] == ["a", "é", " ", "b", None] and deltas[-1] == {}
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == [] and chunks[-1]["lowkey"]
    entries = [e for c in chunks[1:-1] for e in c["choices"][0]["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]


def test_logprobs_have_bytes(api, script):
    ids = TOKENIZER.encode("é漢!").ids
    script.queue.append([*ids, 0])
    content = chat(api, max_tokens=8, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert bytes(b for e in content[:-1] for b in e["bytes"]) == "é漢!".encode()
    assert content[-1]["token"] == "<|endoftext|>"
    assert all(len(e["top_logprobs"]) == 3 for e in content)
    last = script.seen[-1].token_ids[-1]
    assert content[0]["logprob"] == script.logprobs[last, ids[0]]
    assert content[0]["top_logprobs"][0]["logprob"] == script.logprobs[last].max()
    assert chat(api, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_the_limit_is_the_context_by_default(api, script):
    chat(api, max_tokens=None)
    assert script.seen[-1].max_tokens == CONTEXT - len(script.seen[-1].token_ids)
    chat(api, max_tokens=None, max_completion_tokens=3)
    assert script.seen[-1].max_tokens == 3
    chat(api, max_tokens=4, max_completion_tokens=4)
    refused(post(api, max_tokens=4, max_completion_tokens=5), "max_completion_tokens", "max_tokens")
    refused(post(api, max_tokens=None, messages=[{"role": "user", "content": "x" * CONTEXT}]), "messages")
    refused(post(api, max_tokens=CONTEXT), "max_tokens", str(CONTEXT))


def test_n_choices(api):
    body = chat(api, n=3, seed=4)
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert len({c["message"]["content"] for c in body["choices"]}) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", None),
        ("messages", "Hello"),
        ("messages", [{"content": "no role"}]),
        ("messages", [{"role": "", "content": "x"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "oracle", "content": "refused by the template"}]),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("logprobs", 1),
        ("top_logprobs", 2),
        ("top_logprobs", 21),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "grammar"}),
        ("modalities", ["audio"]),
        ("best_of", 2),
        ("n", 0),
        ("min_tokens", 7),
    ],
)
def test_bad_values(api, field, value):
    body = {"model": "dense", "messages": HELLO, "max_tokens": 6, field: value}
    response = api.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    refused(response, field, field)


def test_what_changes_nothing_is_accepted(api):
    chat(api, tools=[], tool_choice="auto", response_format={"type": "text"}, functions=[], unknown={"a": 1})


def test_a_model_without_a_template_has_no_chat(api):
    variant = api.app.state.service.variants.get("reduced")
    template, variant.text.chat_template = variant.text.chat_template, None
    try:
        refused(post(api, model="reduced"), "messages", "no chat template", "/v1/completions")
    finally:
        variant.text.chat_template = template


def test_templates_as_transformers_renders_them():
    """Names and settings that templates of well-known models rely on."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = """{%- set ns = namespace(n=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if loop.index0 == 9 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
{{ '<|' + message['role'] + '|>' }}{% generation %}{{ message.content | trim }}{% endgeneration %}
    {% if message.name is defined %}({{ message.name }}){% endif %}

{%- endfor %}
{{ {'a': ['é', '<b>']} | tojson }} {{ ns.n }} {{ 'x' if tools is none else 'y' }} {{ range(3) | list }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""
    messages = [
        {"role": "user", "content": " Hi <x> "},
        {"role": "assistant", "content": "é", "name": "me"},
    ]
    for generation in (False, True):
        (expected,), _ = render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=generation, bos_token="<s>"
        )
        rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(
            messages, add_generation_prompt=generation
        )
        assert rendered == expected and "<x>" in rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages[0].content / 0 }}",
        "{{ messages[0].nothing.nothing }}",
        "{% include 'file:///etc/passwd' %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_reaches_nothing_outside(source):
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    except TemplateRefusedError:
        return
    assert text == "", "whatever it read, it came to nothing"


def test_half_a_character_in_a_field_that_only_the_template_reads_is_refused():
    template = ChatTemplate("{{ messages[0].name }}", {})
    assert template.render([{"name": "\U0001f469"}], add_generation_prompt=True) == "\U0001f469"
    with pytest.raises(TemplateRefusedError, match="surrogates"):
        template.render([{"name": "\ud83d"}], add_generation_prompt=True)


def test_a_template_that_is_none_costs_the_chat_only(tmp_path):
    with pytest.raises(TemplateRefusedError, match="no good"):
        ChatTemplate("{% for %}", {})
    assert jinja2.__version__ >= "3.1.6", "older ones have known ways out of the sandbox"


def test_where_templates_and_special_tokens_are_read_from(tmp_path):
    assert template_of(read_tokenizer_config(tmp_path)) is None
    config = {
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = read_tokenizer_config(tmp_path)
    assert template_of(read) == "d"
    assert special_tokens_of(read) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert template_of(read_tokenizer_config(tmp_path)) == "from the file"


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        '"text"',
        "[" * 40_000,
        "{",
        '{"chat_template": "{% for %}"}',
        json.dumps({"chat_template": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30}),
        '{"chat_template": [{"name": [], "template": "x"}, {"name": {}}, 5, {"template": "x"}]}',
        '{"chat_template": {"default": "x"}}',
        '{"model_max_length": ' + "9" * 5000 + "}",
        b'{"eos_token": "\xff"}',
        Path.mkdir,
        lambda file: file.symlink_to("nowhere"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str | bytes) else x.__name__,
)
def test_a_bad_configuration_costs_the_chat_only(api, config, tmp_path, caplog):
    variant = api.app.state.service.variants.get("reduced")
    (tmp_path / "tokenizer.json").write_bytes((Path(variant.source) / "tokenizer.json").read_bytes())
    file = tmp_path / "tokenizer_config.json"
    if callable(config):
        config(file)
    else:
        file.write_bytes(config if isinstance(config, bytes) else config.encode())
    try:
        variant.load_text(tmp_path)
        refused(post(api, model="reduced"), "messages", "no chat template")
        if not isinstance(config, str):
            assert "reduced: no chat: " in caplog.text and str(file) in caplog.text
        assert api.post("/v1/completions", json={"model": "reduced", "prompt": "x"}).status_code == 200
        assert api.get("/tokenizer_info", params={"model": "reduced"}).status_code == 200
    finally:
        variant.load_text(Path(variant.source))
    chat(api, model="reduced")
