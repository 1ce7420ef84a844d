"""Lead random requests past the first look-up, and keep them short. Imported by schemathesis, not by pytest."""

import os
from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A valid name becomes a model's, a valid limit a small one: what was valid stays so, what was not too."""
    if isinstance(body, dict):
        if isinstance(body.get("model"), str) and len(body["model"]) <= 256:
            body["model"] = "dense"
        if isinstance(body.get("state_id"), str) and len(body["state_id"]) <= 64:
            body["state_id"] = os.environ["LOWKEY_TEST_STATE"]
        for field in ("max_tokens", "max_completion_tokens"):
            value = body.get(field)
            if type(value) is int and 16 < value <= 2**31:
                body[field] = 16
    return body


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Half of the generated ids are those of something that exists."""
    real = {"state_id": os.environ["LOWKEY_TEST_STATE"], "model_id": "dense"}
    if context.operation.method == "delete":
        return path_parameters
    for name, value in (path_parameters or {}).items():
        if name in real and len(str(value)) % 2:
            path_parameters[name] = real[name]
    return path_parameters
