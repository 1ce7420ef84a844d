"""litellm, langchain-openai and llm, unmodified: tools, thoughts and structured output, whole and streamed, all of it
by /v1/chat/completions: there is no /v1/responses here."""

import json
import subprocess

import chat_clients
import jsonschema
import pytest
from live_server import DEADLINE_S
from tool_requests import CITY, HELLO, NO_THOUGHTS, TOOLS

pytestmark = pytest.mark.slow

SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture
def ask(chat_server, clients, tmp_path):
    """What a client makes of the answers."""

    def run(client, model):
        fields = {"model": model, "messages": HELLO, "tools": TOOLS, "extra_body": NO_THOUGHTS}
        done = subprocess.run(
            [clients / "python", chat_clients.__file__, client, f"{chat_server.url}/v1", json.dumps(fields)],
            capture_output=True,
            text=True,
            timeout=3 * DEADLINE_S,
            cwd=tmp_path,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return json.loads(done.stdout.splitlines()[-1])  # litellm prints something of its own before

    return run


@pytest.mark.parametrize("client", ["litellm", "langchain"])
def test_calls(ask, client):
    answer = ask(client, "qwen3_coder")
    for calls in answer["calls"]:
        ((name, arguments),) = calls
        jsonschema.validate(arguments, SCHEMAS[name])
    assert answer["reasons"] == ["tool_calls", "tool_calls"]
    if client == "litellm":
        assert all(answer["thoughts"])
    else:
        assert answer["again"] == "length" and answer["async"]
        for parsed in answer["parsed"]:
            jsonschema.validate(parsed, CITY)


def test_llm(ask):
    answer = ask("llm", "hermes")
    for parsed in answer["parsed"]:
        jsonschema.validate(parsed, CITY)
    assert answer["texts"][0] == answer["texts"][1] != ""
