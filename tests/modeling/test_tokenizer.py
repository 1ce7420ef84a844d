"""tokenizer.json: opened to read any text whole, or refused by name."""

import json
import os

import pytest
from checkpoints import byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling.sources import CheckpointError
from modeling.tokenizer import TokenizerFile

TEXT = "Once upon a time, " * 40


def save_after_use(directory, **call):
    """What stock `transformers` leaves of a tokenizer that was last called with these options."""
    file = directory / "tokenizer.json"
    file.parent.mkdir(exist_ok=True)
    byte_tokenizer().save(str(file))
    used = PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<|endoftext|>", model_max_length=10**6
    )
    used(["a text", "another text"], **call)
    used.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("call", "ignored"),
    [
        ({}, []),
        (
            {"truncation": True, "max_length": 128, "padding": "max_length"},
            ["truncation to 128 tokens", "padding to 128 tokens"],
        ),
        ({"truncation": True, "max_length": 7}, ["truncation to 7 tokens"]),
        ({"padding": True}, ["padding"]),
    ],
)
def test_what_a_call_left_behind_is_ignored_as_transformers_ignores_it(tmp_path, call, ignored):
    directory = save_after_use(tmp_path / "c", **call)
    tokenizer, found = TokenizerFile(directory).open()
    assert found == ignored
    stock = AutoTokenizer.from_pretrained(directory)
    for text in (TEXT, "a", ""):
        ids = tokenizer.encode(text).ids
        assert ids == stock(text)["input_ids"] == byte_tokenizer().encode(text).ids
    assert [e.ids for e in tokenizer.encode_batch(["a", "a text"])] == stock(["a", "a text"])["input_ids"]


def test_dropout_is_ignored_so_that_a_text_is_always_the_same_tokens(tmp_path):
    vocab = {letter: i for i, letter in enumerate("ab")} | {"ab": 2, "abab": 3}
    model = models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "ab")], dropout=0.5)
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer, ignored = TokenizerFile(tmp_path).open()
    assert ignored == ["a dropout of 0.5"]
    assert {tuple(tokenizer.encode("abab" * 5).ids) for _ in range(20)} == {(3,) * 5}


PANIC = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
"""A normalizer that makes the library panic."""
SPOILT = {
    "empty": b"",
    "cut": b"{",
    "other": b'{"version": "1.0"}',
    "brackets": b"[" * 100_000,
    "nested": b'{"version": "1.0", "truncation": ' + b"[" * 100_000,
    "bytes": b'{"version": "\xff"}',
    "digits": b'{"version": "1.0", "padding": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"version": "\\ud800"}',
    "panic": json.dumps({**json.loads(byte_tokenizer().to_str()), **PANIC}).encode(),
}


@pytest.mark.parametrize("content", SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"/tokenizer\.json is not a tokenizer of .*: \S"):
        TokenizerFile(tmp_path).open()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"/tokenizer\.json is missing"):
        TokenizerFile(tmp_path)
    file.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"/tokenizer\.json is missing"):
        TokenizerFile(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"/tokenizer\.json can't be read: Is a directory"):
        TokenizerFile(tmp_path)
    file.rmdir()
    file.touch(mode=0)
    if not os.access(file, os.R_OK):  # root may read it
        with pytest.raises(CheckpointError, match=r"/tokenizer\.json can't be read: Permission denied"):
            TokenizerFile(tmp_path)
