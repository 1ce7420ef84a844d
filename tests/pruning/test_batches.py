"""What a training step reads."""

import pytest
import torch
from checkpoints import GATED, write_checkpoint

from modeling.checkpoint import open_checkpoint
from pruning.batches import Batches, token_stream
from pruning.calibration import Encoder, Text
from pruning.errors import PruningError


def batches(tokens=1000, *, window=32, batch=3, seed=0):
    return Batches(torch.arange(tokens), window=window, batch=batch, seed=seed)


def test_an_epoch_predicts_no_token_twice_and_the_next_one_cuts_elsewhere():
    b = batches()
    rows = torch.cat([b[i] for i in range(-(-2 * b.per_epoch // 3))])
    assert rows.shape[1] == 33
    assert (rows.diff(dim=1) == 1).all()
    first, second = rows[: b.per_epoch], rows[b.per_epoch : 2 * b.per_epoch]
    for epoch in (first, second):
        targets = epoch[:, 1:].flatten()
        assert len(targets.unique()) == len(targets) == b.per_epoch * 32
    assert first[0, 0] % 32 != second[0, 0] % 32
    assert not first[:, 0].sort().values.equal(first[:, 0])


def test_a_batch_depends_on_seed_and_index_alone():
    one, other = batches(), batches()
    other[40]  # draws other epochs first
    for i in (25, 0, 11):
        assert one[i].equal(other[i])
    assert not batches(seed=1)[0].equal(one[0])


def test_the_stream_takes_whole_documents_until_it_is_long_enough(tmp_path):
    encoder = Encoder(open_checkpoint(write_checkpoint(tmp_path / "dense", GATED)))
    text = Text("letters", [letter * 10 for letter in "abcdefgh"])
    stream = token_stream(encoder, text, tokens=30, seed=0)
    assert len(stream) == 33  # three documents, each behind an end-of-text token
    assert (stream.view(3, 11)[:, 0] == 0).all()
    everything = token_stream(encoder, text, tokens=10**6, seed=0)
    assert len(everything) == 88
    assert everything[:33].equal(stream)
    assert not token_stream(encoder, text, tokens=10**6, seed=1).equal(everything)


def test_a_text_shorter_than_two_windows_is_refused():
    assert batches(65).per_epoch == 1
    with pytest.raises(PruningError, match="64 tokens, which are not two windows of 32"):
        batches(64)
    with pytest.raises(PruningError, match="batch=0 must be at least 1"):
        batches(batch=0)
