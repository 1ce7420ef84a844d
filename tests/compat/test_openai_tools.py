"""The openai SDK with models that think and call tools, and requests as chat front ends send them."""

import json

import httpx
import jsonschema
import openai
import pydantic
import pytest
from templates import TEMPLATES
from tool_requests import CITY, HELLO, NO_THOUGHTS, TOOLS

NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client(chat_server):
    return openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_call_that_is_demanded_comes_and_its_answer_goes_back(client, model):
    fields = {"model": model, "tools": TOOLS, "max_tokens": 2000, "seed": 1, "extra_body": NO_THOUGHTS}
    answer = client.chat.completions.create(messages=HELLO, tool_choice=NAMED, **fields)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.type == "function" and call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), CITY)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    again = client.chat.completions.create(
        messages=[*HELLO, choice.message, result], **{**fields, "max_tokens": 5}, tool_choice="none"
    )
    assert again.choices[0].finish_reason == "length" and again.choices[0].message.content


@pytest.mark.parametrize("model", TEMPLATES)
def test_the_stream_helper_puts_calls_together(client, model):
    with client.chat.completions.stream(
        model=model,
        messages=HELLO,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=2000,
        extra_body=NO_THOUGHTS,
    ) as stream:
        events = list(stream)
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    assert choice.finish_reason == "tool_calls"
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == [call.function.name]


def test_thoughts_are_told_apart(client):
    fields = {"model": "qwen3_coder", "messages": HELLO, "max_tokens": 12, "seed": 3}
    message = client.chat.completions.create(**fields).choices[0].message
    thought = message.model_extra["reasoning_content"]
    assert thought and message.model_extra["reasoning"] == thought and not message.content
    stream = list(client.chat.completions.create(**fields, stream=True))
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas) == thought
    assert not any(d.content for d in deltas)
    message = client.chat.completions.create(**fields, extra_body=NO_THOUGHTS).choices[0].message
    assert message.content and not (message.model_extra or {}).get("reasoning_content")


def test_parsed_tools_and_answers(client):
    """What the SDK makes of classes: it asks for strict tools, and for JSON of a schema."""

    class Weather(pydantic.BaseModel):
        days: int = pydantic.Field(ge=1, le=9)

    tool = openai.pydantic_function_tool(Weather, name="weather")
    fields = {"model": "hermes", "messages": HELLO, "max_tokens": 2000, "seed": 1}
    answer = client.chat.completions.parse(
        **fields, tools=[tool], tool_choice="required", extra_body=NO_THOUGHTS
    )
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


def test_requests_as_chat_front_ends_send_them(chat_server):
    """Fields as Open WebUI and Continue send them beside the messages."""
    web_ui = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "model": "hermes",
        "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
        "tools": TOOLS,
        "temperature": 0.7,
        "max_tokens": 5,
        "metadata": {"chat_id": "x", "features": {"web_search": False}},
        "params": {},
        "tool_ids": [],
        "session_id": "x",
        "background_tasks": {"title_generation": True},
    }
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": ""}}
    editor = {
        "model": "olmo3",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
            {"role": "assistant", "content": " ", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Noon."},
        ],
        "tools": [{**TOOLS[1], "displayTitle": "Now", "readonly": True}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "max_tokens": 5,
        "stream": True,
        "stop": ["<|im_end|>"],
        "prediction": None,
    }
    for body in (web_ui, editor):
        response = httpx.post(f"{chat_server.url}/v1/chat/completions", json=body, timeout=240)
        assert response.status_code == 200, response.text
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events[-1] == "[DONE]" and not any("error" in json.loads(event) for event in events[:-1])
