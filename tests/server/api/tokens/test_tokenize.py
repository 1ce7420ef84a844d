"""/tokenize, /detokenize and /tokenizer_info: vLLM's fields, the tokenizer's own answers."""

import pytest
from checkpoints import CHATML, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from scripted import CONTEXT
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE

from server.text.detokenizer import TokenTexts

TOKENIZER = byte_tokenizer()


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status, param):
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_tokenize(api):
    ids = TOKENIZER.encode("Hello é").ids
    expected = {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
    assert ok(api.post("/tokenize", json={"model": "reduced", "prompt": "Hello é"})) == expected
    assert ok(api.post("/tokenize", json={"prompt": "Hello é"})) == expected, "the first variant by default"
    strings = ok(api.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True}))
    assert strings["token_strs"] == ["H", "Ã", "©"]
    assert ok(api.post("/tokenize", json={"prompt": ""}))["tokens"] == []


def test_tokenize_messages(api):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    ids = ok(api.post("/tokenize", json=body))["tokens"]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<user>Hi<|endoftext|>\n<assistant>"
    ids = ok(api.post("/tokenize", json={**body, "add_generation_prompt": False}))["tokens"]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<user>Hi<|endoftext|>\n"


def test_special_tokens_are_added_to_prompts_and_not_to_messages(api, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    monkeypatch.setattr(api.app.state.service.variants.get("dense").text, "tokenizer", tokenizer)

    def first(**fields):
        return ok(api.post("/tokenize", json={"model": "dense", **fields}))["tokens"][0] == 0

    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    assert first(prompt="x") and first(prompt="x", add_special_tokens=True) and not first(**messages)
    assert not first(prompt="x", add_special_tokens=False) and first(**messages, add_special_tokens=True)
    usage = ok(api.post("/v1/completions", json={"model": "dense", "prompt": "x", "max_tokens": 1}))["usage"]
    assert usage["prompt_tokens"] == 2


def test_detokenize(api):
    assert ok(api.post("/detokenize", json={"tokens": TOKENIZER.encode("é !").ids})) == {"prompt": "é !"}
    assert ok(api.post("/detokenize", json={"model": "dense", "tokens": [0]})) == {"prompt": "<|endoftext|>"}
    assert ok(api.post("/detokenize", json={"tokens": []})) == {"prompt": ""}
    refused(api.post("/detokenize", json={"tokens": [257]}), 400, "tokens")


def test_tokenizer_info(api):
    info = ok(api.get("/tokenizer_info", params={"model": "dense"}))
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast" and info["chat_template"] == CHATML
    assert info["eos_token"] == "<|endoftext|>"
    assert ok(api.get("/tokenizer_info")) == info
    refused(api.get("/tokenizer_info", params={"model": "gpt-4"}), 404, "model")


def test_tokenizer_info_with_half_a_surrogate_pair(api, monkeypatch):
    variant = api.app.state.service.variants.get("dense")
    monkeypatch.setattr(variant.text, "tokenizer_config", {"pad_token": "\ud800", "eos_token": "é"})
    info = ok(api.get("/tokenizer_info"))
    assert (info["pad_token"], info["eos_token"]) == ("\ud800", "é")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "oracle", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "x", "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"messages": [], "continue_final_message": True}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_bad_values(api, path, body, param):
    refused(api.post(path, json=body), 400, param)


def test_an_unknown_model(api):
    refused(api.post("/tokenize", json={"model": "gpt-4", "prompt": "x"}), 404, "model")


TEXTS = TokenTexts(TOKENIZER)


@given(st.text(max_size=20))
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(text):
    assert b"".join(TEXTS.bytes(i) for i in TOKENIZER.encode(text).ids) == text.encode()


def test_tokens_of_a_tokenizer_with_leading_spaces_and_byte_fallback():
    from tokenizers import decoders

    vocab = {"a": 0, "\u2581the": 1, "<0xE2>": 2, "\u2581": 3}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = TokenTexts(tokenizer)
    assert [texts.text(i) for i in range(4)] == ["a", " the", "\ufffd", " "]
    assert texts.bytes(2) == b"\xe2" and texts.bytes(1) == b" the"
