"""Checks of the API process that need no engine behind them."""

import asyncio
import errno
import os
from types import SimpleNamespace

import httpx
import pytest
from checkpoints import byte_tokenizer

from server.api.ab import compare, scoring
from server.api.ab.schemas import CompareRequest
from server.api.app import create_app
from server.api.http.errors import APIError
from server.api.serving.metrics import Metrics
from server.api.serving.prompts import encode_prompt
from server.api.serving.routing import Routing
from server.api.serving.service import Service
from server.settings import Settings

METRICS = Metrics()
LINK = SimpleNamespace(front_end="0", started=0)


def variant(name="dense", **info):
    """What the API knows of a variant that is up."""
    defaults = {
        "vocab_size": 257,
        "context_length": 100,
        "state_bytes_per_request": 1000,
        "conv_bytes_per_request": 0,
        "bytes_per_page": 0,
    }
    return SimpleNamespace(
        name=name,
        text=SimpleNamespace(tokenizer=byte_tokenizer(), sha256="a", longest_token=13),
        loaded=True,
        metrics=METRICS.add_variant(name),
        client=SimpleNamespace(up=True),
        info=SimpleNamespace(**{**defaults, **info}),
    )


def service(*variants, **settings):
    by_name = {v.name: v for v in variants}
    return Service(
        Settings(**settings),
        SimpleNamespace(get=by_name.get, names=list(by_name)),
        METRICS,
        Routing(Settings()),
        LINK,
    )


def test_an_unexpected_error_has_the_shape_and_the_request_id(caplog):
    app = create_app(Settings(), LINK)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a secret path")

    async def work():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/broken", headers={"x-request-id": "me-1"})

    response = asyncio.run(work())
    assert response.status_code == 500 and response.headers["x-request-id"] == "me-1"
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("internal_error", None, 500)
    assert "secret" not in error["message"]
    assert "a secret path" in caplog.text and "me-1" in caplog.text


def test_text_that_the_tokenizer_knows_and_the_model_does_not():
    # A tokenizer may have more tokens than the model has embeddings: one such id would end the engine.
    small = variant(vocab_size=60)
    with pytest.raises(APIError, match="token id .* is not below the vocabulary size 60") as error:
        asyncio.run(encode_prompt(small, "\xff", 1))
    assert error.value.status == 400 and error.value.param == "prompt"


def test_a_prompt_may_fill_the_context_to_the_last_token():
    v = variant()
    assert len(asyncio.run(encode_prompt(v, "x" * 90, 10))) == 90
    rejected = METRICS.rejected.labels("dense", "too_long")._value
    before = rejected.get()
    with pytest.raises(
        APIError, match="100 tokens, but the prompt has 90 and max_tokens is 11, 101 together"
    ):
        asyncio.run(encode_prompt(v, "x" * 90, 11))
    assert rejected.get() == before + 1
    # Far too long to be worth tokenising: no token has more than 13 characters.
    v.text.tokenizer = None
    with pytest.raises(APIError, match="100 tokens, but the prompt has at least 107"):
        asyncio.run(encode_prompt(v, "x" * 1400, 1))


def chosen(s, **fields):
    body = CompareRequest(prompt="x", **fields)
    variants = compare._chosen(s, body)
    compare._check_comparable(s.settings, body, variants)
    return variants


def test_variants_that_cannot_be_compared():
    base = variant("a")
    same, other_vocab = variant("b"), variant("c", vocab_size=258)
    other_tokenizer = variant("d")
    other_tokenizer.text.sha256 = "b"
    s = service(base, same, other_vocab, other_tokenizer)
    assert chosen(s, variants=["a", "b"]) == [base, same]
    # The log-probabilities of one vocabulary can't be read as those of another.
    for names in (["a", "c"], ["c", "a"], ["b", "d"]):
        with pytest.raises(APIError, match="another tokenizer or vocabulary size") as error:
            chosen(s, variants=names)
        assert error.value.status == 400 and error.value.param == "variants"


def test_a_comparison_takes_no_more_memory_than_allowed():
    s = service(variant("a"), variant("b"), compare_bytes=2**20)
    most = 2**20 // (257 * 4)
    assert chosen(s, max_tokens=most)
    with pytest.raises(APIError, match=f"at most {most} in a comparison") as error:
        chosen(s, max_tokens=most + 1)
    assert error.value.param == "max_tokens"


def test_shared_memory_is_reserved_before_it_is_written(tmp_path, monkeypatch):
    path = tmp_path / "x"
    scoring._allocate(path, 1 << 20)
    assert path.stat().st_size == 1 << 20 and path.stat().st_blocks * 512 >= 1 << 20

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(APIError, match="No space left") as error:
        scoring._allocate(tmp_path / "y", 1 << 20)
    assert error.value.status == 503


def test_a_variants_name_is_fit_for_a_label_and_a_file_name():
    assert Settings(variants={"Dense-1.3_b": "x"}).variants
    for name in ("", "a/b", "../x", "-a", "a b", "x" * 65, "é", 'a"'):
        with pytest.raises(ValueError, match="variants"):
            Settings(variants={name: "x"})
