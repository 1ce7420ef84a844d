"""Each example of docs/api.md runs as it stands."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import DEADLINE_S

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)(?: (?!tools)[^\n]*)?\n(.*?)^```$", PAGE, flags=re.M | re.S)
TOOLS = re.findall(r"^```python tools\n(.*?)^```$", PAGE, flags=re.M | re.S)


def test_python_examples(server):
    """One after the other in one program, as a reader would."""
    examples = [text for language, text in BLOCKS if language == "python"]
    assert len(examples) >= 4
    program = "\n".join(examples).replace("http://127.0.0.1:8000", server.url)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    assert "state-" in run.stdout


def test_examples_with_tools(chat_server):
    """The examples that offer tools work as printed, with a model that calls them."""
    (example,) = TOOLS
    first = next(text for language, text in BLOCKS if language == "python").split("for chunk")[0]
    program = (
        (first + example).replace("http://127.0.0.1:8000", chat_server.url).replace('"dense"', '"hermes"')
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("weather {")


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="the examples call curl, which is not installed here"
)
def test_shell_examples(server):
    examples = [text for language, text in BLOCKS if language == "sh"]
    assert len(examples) >= 4
    for example in examples:
        script = example.replace("http://127.0.0.1:8000", server.url).replace("curl -s", "curl -s -f")
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert run.returncode == 0, (example, run.stdout, run.stderr)
        assert run.stdout


def test_every_endpoint_is_on_the_page(server):
    for path in server.http.get("/openapi.json").json()["paths"]:
        if path.startswith("/ui") or path == "/":
            continue
        name = re.sub(r"\{\w+\}", "{id}", path)
        assert name in PAGE or name.removesuffix("/{id}") in PAGE, path


def test_every_field_is_on_the_page(server):
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    for schema in ("CompletionRequest", "ChatRequest"):
        for field in schemas[schema]["properties"]:
            assert f"`{field}`" in PAGE, f"{schema}.{field}"
