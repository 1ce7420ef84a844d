"""Text -> windows, for calibration and for evaluation."""

import hashlib
import itertools
import math
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import GATED, random_tensors, write_checkpoint
from oracle import fla_logits

from modeling.checkpoint import open_checkpoint
from pruning.calibration import (
    BATCH,
    Encoder,
    Text,
    bundled_text,
    cu_seqlens,
    draw_windows,
    take_shard,
    tokens_sha256,
)
from pruning.errors import PruningError
from pruning.evaluation import evaluation_windows, perplexity


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "c", GATED))


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder(checkpoint)


def long_text(documents=6, length=100):
    """Documents in which no stretch of text comes twice, so that a token's place can be told from it."""
    return Text("t", [" ".join(f"{d}.{i}" for i in range(length)) for d in range(documents)])


def test_encoder_puts_end_of_text_before_each_document(encoder):
    ids = encoder("ab")
    assert ids[0] == 0
    assert len(ids) == 3


def test_windows_are_drawn_by_seed_and_recorded(encoder):
    text = long_text()
    windows, origin = draw_windows(encoder, text, count=5, length=32, seed=3)
    assert windows.shape == (5, 32) and windows.dtype == torch.int64
    assert origin.as_json() == {
        "text": "t",
        "text_sha256": text.sha256,
        "seed": 3,
        "windows": 5,
        "window_length": 32,
        "tokens_sha256": hashlib.sha256(struct.pack("<160q", *windows.flatten())).hexdigest(),
        "shard": None,
        "tokens": 160,
    }
    torch.manual_seed(99)  # no global generator has a say
    np.random.seed(99)
    again, _ = draw_windows(encoder, text, count=5, length=32, seed=3)
    other, _ = draw_windows(encoder, text, count=5, length=32, seed=4)
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)


def places(encoder, text, windows):
    """(document, first position) of each window."""
    encoded = [encoder(d) for d in text.documents]
    found = []
    for row in windows.tolist():
        found += [
            (d, at)
            for d, ids in enumerate(encoded)
            for at in range(len(ids) - len(row) + 1)
            if ids[at : at + len(row)] == row
        ]
    return found


def test_windows_come_from_as_many_documents_as_there_are_and_never_overlap(encoder):
    text = long_text()
    windows, _ = draw_windows(encoder, text, count=6, length=32)
    found = places(encoder, text, windows)
    assert sorted(d for d, _ in found) == list(range(6))
    assert len({at for _, at in found}) > 3, "not only the heads of the documents"
    windows, _ = draw_windows(encoder, text, count=40, length=32)
    found = places(encoder, text, windows)
    assert len(found) == 40
    for d in range(6):
        starts = sorted(at for document, at in found if document == d)
        assert all(b - a >= 32 for a, b in itertools.pairwise(starts))


def test_short_documents_are_joined(encoder):
    text = Text("t", [f"short {i}" for i in range(20)])
    windows, _ = draw_windows(encoder, text, count=3, length=48)
    assert (windows == 0).sum() >= 3 * 48 // 10


def test_too_little_text_says_how_much_there_is(encoder):
    available = sum(len(encoder(d)) // 64 for d in long_text().documents)
    with pytest.raises(PruningError, match=rf"windows=1000 of 64 tokens .* which is {available};"):
        draw_windows(encoder, long_text(), count=1000, length=64)


@torch.no_grad()
def test_packed_documents_share_a_window_but_no_state(checkpoint, encoder):
    text = Text("t", [f"document {i} is short" for i in range(40)])
    windows, _ = draw_windows(encoder, text, count=3, length=48)
    offsets = cu_seqlens(windows, checkpoint.spec.eos_token_ids)
    starts = {i for i, token in enumerate(windows.flatten().tolist()) if token == 0}
    assert set(offsets) == starts | {0, 48, 96, 144}
    assert len(starts) > 6
    # Each document gives what it gives alone, whatever stands before it in its window.
    model = checkpoint.load(dtype=torch.float64)
    flat = windows.flatten()
    packed, _ = model(flat, offsets)
    for a, b in itertools.pairwise(offsets):
        alone, _ = model(flat[a:b], [0, b - a])
        assert torch.allclose(packed[a:b], alone, rtol=0, atol=1e-10)
    unbroken, _ = model(flat, [0, 48, 96, 144])
    assert not torch.allclose(packed, unbroken, rtol=0, atol=1e-3)


def test_a_checkpoint_without_an_end_of_text_token_has_one_sequence_a_window():
    assert cu_seqlens(torch.zeros(2, 5, dtype=torch.long), ()) == [0, 5, 10]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_are_whole_batches_and_together_all_windows(encoder, shards):
    windows, origin = draw_windows(encoder, long_text(), count=4 * BATCH + 1, length=16)
    parts = [take_shard(windows, origin, i + 1, shards) for i in range(shards)]
    taken = [row for rows, _ in parts for batch in rows.split(BATCH) for row in batch.tolist()]
    assert sorted(taken) == sorted(windows.tolist())
    batches = [batch.tolist() for batch in windows.split(BATCH)]
    for i, (rows, found) in enumerate(parts):
        assert all(batch.tolist() in batches for batch in rows.split(BATCH))
        assert (found.windows, found.shard) == (len(rows), f"{i + 1}/{shards} of 17 windows")
        assert found.tokens_sha256 == tokens_sha256(rows)


def test_more_shards_than_batches_are_refused(encoder):
    windows, origin = draw_windows(encoder, long_text(), count=5, length=16)
    with pytest.raises(PruningError, match="shard=1/3: 5 windows are 2 batches of 4; .* at most 2 shards"):
        take_shard(windows, origin, 1, 3)


@pytest.mark.parametrize("field", ["windows", "window_length"])
def test_sizes_below_one_are_refused(encoder, field):
    sizes = {"count": 1, "length": 8} | {{"windows": "count", "window_length": "length"}[field]: 0}
    with pytest.raises(PruningError, match=f"{field}=0"):
        draw_windows(encoder, long_text(), **sizes)


def test_bundled_sides_share_no_document():
    train, heldout = bundled_text("train"), bundled_text("heldout")
    assert len(train.documents) > 400  # Debian's Python leaves the tests of the standard library out
    assert len(heldout.documents) > 50
    shared = {d for d in train.documents if len(d) > 200} & set(heldout.documents)
    assert not shared
    assert train.sha256 != heldout.sha256


def test_tokenizer_must_be_there_and_fit(tmp_path, checkpoint):
    small = {**GATED, "vocab_size": 100}
    path = write_checkpoint(tmp_path / "c", small)
    with pytest.raises(PruningError, match="vocab_size=100"):
        Encoder(open_checkpoint(path))("é")
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(PruningError, match=r"tokenizer\.json is not a tokenizer"):
        Encoder(open_checkpoint(path))
    (path / "tokenizer.json").unlink()
    with pytest.raises(PruningError, match=r"tokenizer\.json is missing"):
        Encoder(open_checkpoint(path))


def test_evaluation_windows_are_the_front_of_the_text_and_chain(encoder):
    text = long_text()
    stream = [i for d in text.documents for i in encoder(d)]
    windows = evaluation_windows(encoder, text, tokens=1000, window=64)
    assert windows.shape == (15, 65)
    assert windows[:, :-1].flatten().tolist() == stream[: 15 * 64]
    assert windows[:, 1:].flatten().tolist() == stream[1 : 15 * 64 + 1]
    whole = evaluation_windows(encoder, text, window=64)
    assert whole.shape[0] == (len(stream) - 1) // 64


@pytest.mark.parametrize("tokens", [10, -1])
def test_evaluation_of_less_than_a_window_is_refused(encoder, tokens):
    with pytest.raises(PruningError, match=f"tokens={tokens} must be at least 64"):
        evaluation_windows(encoder, long_text(), tokens=tokens, window=64)


def test_evaluation_beyond_the_text_says_how_much_there_is(encoder):
    with pytest.raises(PruningError, match=r"tokens=6400 are more than .* which is 2;"):
        evaluation_windows(encoder, Text("t", ["ab"]), tokens=6400, window=64)
    with pytest.raises(
        PruningError, match=r"64 tokens, which one window scores, .* which is 2; ask for shorter windows"
    ):
        evaluation_windows(encoder, Text("t", ["ab"]), window=64)


def test_perplexity_is_that_of_an_independent_forward(checkpoint, encoder):
    windows = evaluation_windows(encoder, long_text(), tokens=320, window=64)
    steps = []
    result = perplexity(checkpoint.load(), windows, batch=2, advance=steps.append)
    logits = fla_logits(random_tensors(GATED), GATED, windows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten())
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert (result.tokens, result.window) == (320, 64)
    assert steps == [128, 128, 64]


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, encoder):
    tensors = random_tensors(GATED)
    tensors["lm_head.weight"][0, 0] = float("nan")
    model = open_checkpoint(write_checkpoint(tmp_path / "c", GATED, tensors)).load()
    with pytest.raises(PruningError, match="NaN or Inf"):
        perplexity(model, evaluation_windows(encoder, long_text(), tokens=64, window=64))
