"""guidellm, unmodified: a short concurrent run, no errors, token counts right."""

import json
import subprocess

import pytest
from live_server import DEADLINE_S

pytestmark = pytest.mark.slow

OUTPUT, PROMPT = 16, 32


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_concurrent_run(server, checkpoints, clients, tmp_path, path):
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={server.url},model=dense,request_format={path}"
    command = [
        *(str(clients / "guidellm"), "run", "--backend", backend),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"),
        *("--tokenizer", f"kind=huggingface_auto,model={checkpoints['dense']}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    ]
    run = subprocess.run(
        ["env", "HF_HUB_OFFLINE=1", f"HF_HOME={tmp_path / 'hf'}", *command],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
        cwd=tmp_path,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert [len(requests[kind]) for kind in ("successful", "errored", "incomplete")] == [12, 0, 0]
    for request in requests["successful"]:
        sent = json.loads(request["request_args"])["body"]
        # Synthetic text is cut to length by its tokens; chat adds the template's.
        if "prompt" in sent:
            tokens = len(sent["prompt"].encode())
        else:
            text = sent["messages"][0]["content"][0]["text"]
            tokens = len(f"<user>{text}\n<assistant>".encode()) + 1
        assert request["input_metrics"]["text_tokens"] == tokens
        assert request["output_metrics"]["text_tokens"] == OUTPUT
        assert request["info"]["timings"]["token_iterations"] <= OUTPUT
    server.wait_idle()
