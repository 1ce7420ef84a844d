"""The sampling that a checkpoint's makers name in generation_config.json: what is taken, and what is wrong with it."""

import json

import pytest
from pydantic import ValidationError

from server.api.completions.schemas import SamplingFields
from server.text.generation_config import LIMITS, read_sampling

QWEN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2]}


def write(path, content):
    file = path / "generation_config.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_what_is_taken(tmp_path):
    assert read_sampling(tmp_path) == ({}, [])
    assert read_sampling(write(tmp_path, QWEN)) == ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, [])
    more = {"min_p": 0.1, "repetition_penalty": 1.05, "temperature": 0, "top_k": None, "max_new_tokens": 2048}
    assert read_sampling(write(tmp_path, more))[0] == {
        "temperature": 0,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 2.5),
        ("temperature", "0.6"),
        ("temperature", True),
        ("temperature", [0.6]),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", 2.5),
        ("top_k", -2),
        ("top_k", 2**31),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", "x" * 10**6),
    ],
)
def test_a_bad_value_is_left_out_and_named(tmp_path, name, value):
    found, (problem,) = read_sampling(write(tmp_path, {**QWEN, name: value}))
    good = {key: QWEN[key] for key in ("temperature", "top_p", "top_k") if key != name}
    assert found == good
    assert "generation_config.json" in problem and name in problem and len(problem) < 400


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'"x"', b"\xff", b"[" * 10**5, b'{"top_k": NaN}', b'{"top_k": 1e999}']
)
def test_a_file_that_can_not_be_read_is_named(tmp_path, content):
    found, (problem,) = read_sampling(write(tmp_path, content))
    assert found == {} and "generation_config.json" in problem


@pytest.mark.parametrize("name", LIMITS)
def test_the_limits_are_those_of_requests(name):
    least, most = LIMITS[name]
    step = 1 if name == "top_k" else 1e-9
    for value in (least, most):
        assert getattr(SamplingFields.model_validate({name: value}), name) == value
    for value in (least - step, most + step):
        with pytest.raises(ValidationError):
            SamplingFields.model_validate({name: value})
