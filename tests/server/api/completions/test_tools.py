"""Tools over HTTP: into the prompt, out of the answer, whole and streamed, by templates of the shape of public ones."""

import json

import pytest
import scripted
from answers import TOOLS, written
from checkpoints import byte_tokenizer
from llguidance import LLMatcher, LLTokenizer
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from templates import QWEN, QWEN3, TEMPLATES
from transformers.utils.chat_template_utils import render_jinja_template

from server.api.completions import answer_schemas
from server.text.chat_template import ChatTemplate
from server.text.detokenizer import TokenTexts

TOKENIZER = byte_tokenizer()
HELLO = {"role": "user", "content": "How is it in Bern?"}
OFFERED = [
    {"type": "function", "function": {"name": name, "description": f"Tells {name}.", "parameters": schema}}
    for name, schema in TOOLS.items()
]
CALLS = [("get_weather", {"city": 'Bern </a> "é"', "days": 3}), ("now", {})]
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """The API over scripted variants with room for tools in a prompt of bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripted, "CONTEXT", 8192)
        with scripted.scripted_api(tmp_path_factory.mktemp("api"), patch) as client:
            yield client


@pytest.fixture
def model(api, script, monkeypatch):
    """Has the model use a template and say texts, one for each choice to come."""
    variant = api.app.state.service.variants.get("dense")

    def use(source, *said):
        monkeypatch.setattr(variant.text, "chat_template", ChatTemplate(source, {}))
        script.queue[:] = [[*TOKENIZER.encode(text).ids, 0] for text in said]

    return use


def post(api, **fields):
    body = {"model": "dense", "messages": [HELLO], "tools": OFFERED, **fields}
    return api.post("/v1/chat/completions", json=body)


def whole(api, **fields):
    response = post(api, **fields)
    assert response.status_code == 200, response.text
    answer_schemas.ChatCompletion.model_validate(response.json(), extra="forbid")
    ChatCompletion.model_validate(response.json())
    return response.json()["choices"]


def chunks(api, **fields):
    response = post(api, stream=True, **fields)
    assert response.status_code == 200, response.text
    blocks = [block.removeprefix("data: ") for block in response.text.split("\n\n")]
    assert blocks[-2:] == ["[DONE]", ""]
    return [json.loads(block) for block in blocks[:-2]]


def joined(events):
    """The choices that the openai package makes of a stream's events."""
    state = ChatCompletionStreamState()
    for event in events:
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    return [choice.model_dump() for choice in state.current_completion_snapshot.choices]


def seen(script):
    return TOKENIZER.decode(script.seen[-1].token_ids, skip_special_tokens=False)


def said_by(choice):
    """The calls of a choice, without the ids that are made up for them."""
    message = choice["message"]
    ids = [call["id"] for call in message.get("tool_calls") or []]
    assert len({*ids}) == len(ids) and all(each.startswith("call_") for each in ids)
    return [
        (c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in message.get("tool_calls") or []
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_are_rendered_as_transformers_renders_them(api, model, script, name):
    history = [
        {"role": "system", "content": "Be brief."},
        HELLO,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Let me ask.",
            "tool_calls": [
                {
                    "id": str(n),
                    "type": "function",
                    "function": {"name": f, "arguments": json.dumps(arguments)},
                }
                for n, (f, arguments) in enumerate(CALLS)
            ],
        },
        {"role": "tool", "tool_call_id": "0", "content": "Sunny."},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "Noon."}]},
    ]
    model(TEMPLATES[name], "Sunny at noon.")
    strict = json.loads(json.dumps(OFFERED))
    strict[0]["function"]["strict"] = None
    whole(api, messages=history, tools=strict)
    parsed = json.loads(json.dumps(history))
    for call, (_, arguments) in zip(parsed[2]["tool_calls"], CALLS, strict=True):
        call["function"]["arguments"] = arguments
    parsed[2]["content"], parsed[4]["content"] = "", "Noon."
    (expected,), _ = render_jinja_template(
        [parsed], tools=OFFERED, chat_template=TEMPLATES[name], add_generation_prompt=True
    )
    assert seen(script) == expected
    tokens = api.post("/tokenize", json={"model": "dense", "messages": history, "tools": OFFERED}).json()[
        "tokens"
    ]
    assert tokens == script.seen[-1].token_ids
    assert written(name, CALLS) in expected, "what the test has models say is what templates write"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("logprobs", [False, True])
def test_calls_whole_and_streamed(api, model, name, logprobs):
    text = "Let me see.\n\n" + written(name, CALLS)
    said = f"I ask.\n</think>\n\n{text}" if name == "qwen3_coder" else text
    model(TEMPLATES[name], said, said)
    (choice,) = whole(api, logprobs=logprobs)
    assert said_by(choice) == CALLS and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert choice["message"].get("reasoning_content") == ("I ask." if name == "qwen3_coder" else None)
    events = chunks(api, logprobs=logprobs)
    (streamed,) = joined(events)
    assert said_by(streamed) == CALLS and streamed["finish_reason"] == "tool_calls"
    assert streamed["message"]["content"] == "Let me see."
    assert streamed["message"].get("reasoning_content") == choice["message"].get("reasoning_content")
    deltas = [c["delta"] for event in events for c in event["choices"]]
    begun = [d["tool_calls"][0] for d in deltas if "tool_calls" in d and "id" in d["tool_calls"][0]]
    assert [call["function"] for call in begun] == [{"name": f, "arguments": ""} for f, _ in CALLS]
    assert all(d["tool_calls"][0]["index"] in (0, 1) for d in deltas if "tool_calls" in d)
    if logprobs:
        listed = [c["logprobs"] for event in events for c in event["choices"] if c["logprobs"]]
        entries = [entry for each in listed for entry in each["content"]]
        assert entries == choice["logprobs"]["content"]
        assert bytes(b for e in entries[:-1] for b in e["bytes"]).decode() == said


def test_an_answer_that_is_calls_alone_has_no_content(api, model):
    model(QWEN3, written("hermes", CALLS))
    (choice,) = whole(api)
    assert choice["message"]["content"] is None and said_by(choice) == CALLS
    model(QWEN3, "")
    (choice,) = whole(api)
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "stop"


def test_each_choice_has_its_own_calls(api, model):
    texts = [written("hermes", CALLS), "Sunny.", written("hermes", CALLS[1:])]
    model(QWEN3, *texts, *texts)
    choices = whole(api, n=3)
    assert [said_by(choice) for choice in choices] == [CALLS, [], CALLS[1:]]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    streamed = joined(chunks(api, n=3))
    assert [said_by(choice) for choice in streamed] == [CALLS, [], CALLS[1:]]
    assert [choice["finish_reason"] for choice in streamed] == ["tool_calls", "stop", "tool_calls"]


@pytest.mark.parametrize("together", [1, 7, 1000])
def test_tokens_that_come_together_make_the_same_message(api, model, script, monkeypatch, together):
    monkeypatch.setattr(script, "together", together)
    said = "hm</think>" + "Look: " + written("qwen3_coder", CALLS)
    model(QWEN, said)
    (streamed,) = joined(chunks(api))
    assert said_by(streamed) == CALLS and streamed["message"]["content"] == "Look:"


def test_a_call_that_is_cut(api, model):
    said = "</think>" + written("qwen3_coder", CALLS)
    for limits, reason in (({"max_tokens": 70}, "length"), ({"stop": " </a>"}, "stop")):
        model(QWEN, said, said)
        (choice,) = whole(api, **limits)
        assert choice["finish_reason"] == reason
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert '{"city": "Bern </a> '.startswith(call["function"]["arguments"])
        (streamed,) = joined(chunks(api, **limits))
        (other,) = streamed["message"]["tool_calls"]
        assert other["function"]["arguments"] == call["function"]["arguments"]
        assert streamed["finish_reason"] == reason


def test_one_call_at_a_time(api, model, script):
    said = written("hermes", CALLS)
    model(QWEN3, said, said)
    (choice,) = whole(api, parallel_tool_calls=False)
    assert said_by(choice) == CALLS[:1] and choice["finish_reason"] == "tool_calls"
    (streamed,) = joined(chunks(api, parallel_tool_calls=False))
    assert said_by(streamed) == CALLS[:1] and streamed["finish_reason"] == "tool_calls"
    client = api.app.state.service.variants.get("dense").client
    assert client.aborted >= 2, "what would come after it is not generated"


def test_no_tools_no_calls(api, model, script):
    said = written("hermes", CALLS)
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        model(QWEN3, said)
        (choice,) = whole(api, **fields)
        assert choice["message"]["content"] == said and choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"] and "<tools>" not in seen(script)
    model(QWEN3, "Hm.", "Hm.")
    whole(api, tools=None, tool_choice="auto")
    whole(api, tools=None, tool_choice="none")


def test_tags_may_be_special_tokens(api, model, script, monkeypatch):
    """Special tokens are left out of texts, but not those that say what is a call."""
    variant = api.app.state.service.variants.get("dense")
    tokenizer = byte_tokenizer(["<tool_call>", "</tool_call>", "</think>", "<|other|>"])
    monkeypatch.setattr(variant.text, "tokenizer", tokenizer)
    monkeypatch.setattr(variant.text, "token_texts", TokenTexts(tokenizer))
    model(QWEN)
    said = "hm</think><|other|>" + written("qwen3_coder", CALLS)
    script.queue.append([*tokenizer.encode(said).ids, 0])
    (choice,) = whole(api)
    assert said_by(choice) == CALLS and choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "hm"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_demanded_call_is_held_to_a_grammar(api, model, script, name):
    for choice, made in (("required", CALLS), (NAMED, CALLS[1:])):
        said = ("hm</think>\n\n" if name == "qwen3_coder" else "") + written(name, made)
        model(TEMPLATES[name], said)
        (answer,) = whole(api, tool_choice=choice)
        assert said_by(answer) == made and answer["finish_reason"] == "tool_calls"
        grammar = LLMatcher(LLTokenizer(TOKENIZER.to_str(), eos_token=0), script.seen[-1].grammar)
        assert not grammar.is_error(), grammar.get_error()
        ids = TOKENIZER.encode(said).ids
        assert grammar.try_consume_tokens(ids) == len(ids) and grammar.is_accepting()
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        model(TEMPLATES[name], "Hm.")
        whole(api, **fields)
        assert script.seen[-1].grammar == ""


def test_strict_tools(api, model, script, monkeypatch):
    strict = [{"type": "function", "function": {**OFFERED[0]["function"], "strict": True}}]
    model(QWEN3, "Hm.")
    assert "<tool_call> is no token" in error(post(api, tools=strict))["message"]
    variant = api.app.state.service.variants.get("dense")
    tokenizer = byte_tokenizer(["<tool_call>", "</tool_call>"])
    monkeypatch.setattr(variant.text, "tokenizer", tokenizer)
    monkeypatch.setattr(variant.text, "token_texts", TokenTexts(tokenizer))
    script.queue[:] = [[*tokenizer.encode(written("hermes", CALLS[:1])).ids, 0]]
    (choice,) = whole(api, tools=strict)
    assert said_by(choice) == CALLS[:1] and script.seen[-1].grammar
    assert '"strict"' not in tokenizer.decode(script.seen[-1].token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "bad", "says"),
    [
        (QWEN3, {"type": "object", "properties": {"a": {"type": "nothing"}}}, "nothing"),
        (QWEN, {"properties": {"a>": {}}}, 'f: an argument can\'t be called "a>"'),
        (QWEN, {"$ref": "#/$defs/A", "$defs": {"A": {"properties": [1]}}}, "f: properties must be an object"),
    ],
)
def test_what_a_grammar_can_not_keep_is_refused(api, model, template, bad, says):
    model(template)
    tools = [{"type": "function", "function": {"name": "f", "parameters": bad}}]
    found = error(post(api, tools=tools, tool_choice="required", max_tokens=1))
    assert found["param"] == "tools" and says in found["message"]


def error(response):
    assert response.status_code == 400, response.text
    return response.json()["error"]


def function(**fields):
    return [{"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "function"),
        ({"tools": function(name="")}, "tools", "name"),
        ({"tools": function(name="a b")}, "tools", "name"),
        ({"tools": function(name="<x>")}, "tools", "name"),
        ({"tools": function(parameters="x")}, "tools", "parameters"),
        ({"tools": function(parameters={"type": "array"})}, "tools", "schema of an object"),
        (
            {"tools": function(parameters={"properties": [1]})},
            "tools",
            "f: parameters: properties must be an object, got [1]",
        ),
        ({"tools": function(parameters={"properties": {"a": 5}})}, "tools", "properties.a must be a schema"),
        ({"tools": function(parameters={"required": 5})}, "tools", "required must be a list of names, got 5"),
        ({"tools": function(parameters={"required": [{}]})}, "tools", "required must be a list of names"),
        ({"tools": function(strict="yes")}, "tools", "strict"),
        ({"tools": function() + function()}, "tools", "'f' more than once"),
        ({"tools": {}}, "tools", "list"),
        ({"tools": [function()[0]] * 300}, "tools", "256"),
        ({"tool_choice": "always"}, "tool_choice", "required"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "function"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "function"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "get_weather, now"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED, "tools": []}, "tool_choice", "needs tools"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"response_format": {"type": "json_object"}}, "response_format", "tool_choice: none"),
    ],
)
def test_bad_values(api, model, fields, param, says):
    model(QWEN3)
    found = error(post(api, **fields))
    assert found["param"] == param and says in found["message"], found


def test_templates_without_tools(api, model):
    model("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "no place for tools" in error(post(api))["message"]
    model("{% for t in tools %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}")
    found = error(post(api))
    assert found["param"] == "tools" and "variants.dense.tool_call_parser" in found["message"]
    assert "qwen3_coder" in found["message"]


def test_pictures_are_refused(api):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}}
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
    found = error(post(api, messages=[message], tools=None))
    assert found["param"] == "messages" and "only text is understood, no image_url" in found["message"]


@pytest.mark.parametrize("template", [QWEN, QWEN3], ids=["open", "maybe"])
def test_a_form_begins_behind_thoughts(api, model, script, monkeypatch, template):
    variant = api.app.state.service.variants.get("dense")
    tokenizer = byte_tokenizer(["<think>", "</think>"])
    monkeypatch.setattr(variant.text, "tokenizer", tokenizer)
    monkeypatch.setattr(variant.text, "token_texts", TokenTexts(tokenizer))
    model(template + ("{# <think> #}" if template == QWEN3 else ""))
    said = ("<think>\n" if template == QWEN3 else "") + "hm\n</think>\n\nyes"
    script.queue.append([*tokenizer.encode(said).ids, 0])
    (choice,) = whole(api, tools=None, guided_choice=["yes", "no"])
    assert choice["message"]["reasoning_content"].strip() == "hm" and choice["message"]["content"] == "yes"
    for text, allowed in ((said, True), ("yes", template == QWEN3), (f"{said}s", False)):
        grammar = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=0), script.seen[-1].grammar)
        ids = tokenizer.encode(text).ids
        assert (grammar.try_consume_tokens(ids) == len(ids) and grammar.is_accepting()) is allowed, text
