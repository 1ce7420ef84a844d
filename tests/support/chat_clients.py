"""Asks a server for a call of a tool by litellm, langchain-openai and llm; run with the clients' own Python.

    python chat_clients.py CLIENT URL FIELDS

Prints as JSON what the client makes of the answers: each of whole and streamed answers.
"""

import asyncio
import json
import sys
from typing import Any


def by_litellm(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    import litellm

    asked = {
        "model": f"openai/{fields['model']}",
        "api_base": url,
        "api_key": "none",
        "messages": fields["messages"],
        "extra_body": fields["extra_body"],
    }
    calling = {
        "tools": fields["tools"],
        "tool_choice": "required",
        "max_tokens": 2000,
        "parallel_tool_calls": False,
    }
    whole = litellm.completion(**asked, **calling)
    chunks = list(litellm.completion(**asked, **calling, stream=True))
    streamed = litellm.stream_chunk_builder(chunks, messages=fields["messages"])
    asked["extra_body"] = {}
    thought = litellm.completion(**asked, max_tokens=6).choices[0].message.reasoning_content
    pieces = litellm.completion(**asked, max_tokens=6, stream=True, seed=1)
    return {
        "calls": [
            [(c.function.name, json.loads(c.function.arguments)) for c in each.choices[0].message.tool_calls]
            for each in (whole, streamed)
        ],
        "reasons": [whole.choices[0].finish_reason, streamed.choices[0].finish_reason],
        "thoughts": [
            thought,
            "".join(getattr(p.choices[0].delta, "reasoning_content", None) or "" for p in pieces),
        ],
    }


def by_langchain(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    from langchain_core.messages import ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model=fields["model"], base_url=url, api_key="none", max_tokens=2000, extra_body=fields["extra_body"]
    )
    bound = model.bind_tools(fields["tools"], tool_choice="any", parallel_tool_calls=False)
    whole = bound.invoke(fields["messages"])
    streamed = None
    for chunk in bound.stream(fields["messages"]):
        streamed = chunk if streamed is None else streamed + chunk
    result = ToolMessage("Sunny.", tool_call_id=whole.tool_calls[0]["id"])
    again = model.bind_tools(fields["tools"], max_tokens=5).invoke([*fields["messages"], whole, result])
    schema = {"title": "Days", **fields["tools"][0]["function"]["parameters"]}
    parsed = model.with_structured_output(schema, method="function_calling").invoke(fields["messages"])
    as_json = model.with_structured_output(schema, method="json_schema").invoke(fields["messages"])
    return {
        "calls": [[(c["name"], c["args"]) for c in each.tool_calls] for each in (whole, streamed)],
        "reasons": [each.response_metadata["finish_reason"] for each in (whole, streamed)],
        "again": again.response_metadata["finish_reason"],
        "parsed": [parsed, as_json],
        "async": [(c["name"], c["args"]) for c in asyncio.run(bound.ainvoke(fields["messages"])).tool_calls],
    }


def by_llm(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    from llm.default_plugins.openai_models import Chat

    model = Chat("here", model_name=fields["model"], api_base=url, supports_schema=True, supports_tools=True)
    model.needs_key = None
    schema = fields["tools"][0]["function"]["parameters"]
    answers = [
        model.prompt("How is it in Bern?", schema=schema, stream=stream, max_tokens=2000, key="none")
        for stream in (False, True)
    ]
    texts = [
        model.prompt("Hello", stream=stream, max_tokens=5, seed=1, key="none").text()
        for stream in (False, True)
    ]
    return {"parsed": [json.loads(answer.text()) for answer in answers], "texts": texts}


if __name__ == "__main__":
    client, url, given = sys.argv[1:]
    answer = {"litellm": by_litellm, "langchain": by_langchain, "llm": by_llm}[client](url, json.loads(given))
    sys.stdout.write(json.dumps(answer))
