"""schemathesis over the OpenAPI document: no 5xx, answers match the schema, bad requests are refused."""

import re
import subprocess
from pathlib import Path

import pytest
from live_server import DEADLINE_S

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.mark.slow
def test_random_requests(server, clients, tmp_path):
    state = server.http.post("/v1/states", json={"model": "dense", "prompt": "Once upon"}).json()["id"]
    command = [
        *(str(clients / "schemathesis"), "run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS)),
        *("--phases", "coverage,fuzzing", "--max-examples", "25", "--seed", "1"),
        *("--continue-on-failure", "--warnings", "off", "--request-timeout", str(DEADLINE_S)),
    ]
    hooks = {
        "PYTHONPATH": str(Path(__file__).parent),
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "LOWKEY_TEST_STATE": state,
    }
    run = subprocess.run(
        ["env", *(f"{key}={value}" for key, value in hooks.items()), *command],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    generated = re.search(r"(\d+) generated", run.stdout)
    assert generated and int(generated[1]) > 500, run.stdout[-3000:]
    server.wait_idle()


def test_the_document_says_what_is_true(server):
    document = server.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = set(operation["responses"])
            assert "422" not in responses, (method, path)
            assert {"4XX", "5XX"} <= responses, (method, path)
    assert "HTTPValidationError" not in document["components"]["schemas"]
