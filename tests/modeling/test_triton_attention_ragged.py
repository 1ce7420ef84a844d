"""Decode steps of very long requests beside short ones, run by Triton's interpreter, against the definition in
float64."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from paged_attention import (
    SLOTS,
    SPECS,
    TOLERANCE,
    Paged,
    by_definition,
    check_step,
    close,
    drawn,
    make_mixer,
)

from modeling.runtime.gpu import attention as module
from modeling.runtime.gpu.attention import attention_step
from modeling.runtime.gpu.kernels.attention_step import share_of
from modeling.state import PAGE_TOKENS


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter runs one program after the other."""
    monkeypatch.setattr(module, "PROGRAMS", 12)
    monkeypatch.setattr(module, "LONG_PROGRAMS", 12)


@pytest.fixture
def short_is_long(monkeypatch):
    """Two pages are as many as a program should read."""
    monkeypatch.setattr(module, "WHOLE_TOKENS", 2 * PAGE_TOKENS)
    monkeypatch.setattr(module, "PIECE_TOKENS", PAGE_TOKENS)


RAGGED = {0: 310, 5: 0, 1: 127, 3: 128, 4: 255, 2: 63}
"""Tokens of slots, of which three are in pieces: 0 in five, 3 in three, 4 in four."""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("programs", [12, 2, 60])
@pytest.mark.usefixtures("short_is_long")
def test_a_step_of_long_rows_among_short_ones(monkeypatch, programs, dtype):
    """With a program for each further piece, with one for all of them, and where every row has several programs."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(module, "LONG_PROGRAMS", programs)
    paged = Paged(SPECS["qwen"], RAGGED, dtype, 1)
    check_step(make_mixer("qwen", dtype), paged, [3, 0, 5, 4, 1, 2], dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("short_is_long")
def test_a_step_of_more_rows_than_are_looked_at_at_once():
    """The first long row is among the first 128, the second behind them."""
    mixer, paged = make_mixer("narrow"), Paged(SPECS["narrow"], RAGGED, torch.float32, 1)
    slots = [SLOTS] * 133
    slots[7], slots[130], slots[132] = 4, 0, 1
    projected = drawn(mixer, len(slots), torch.float32)
    expected = {i: by_definition(mixer, projected[i], *paged.history(slots[i]))[0] for i in (7, 130, 132)}
    o = attention_step(mixer, projected, paged.state, torch.tensor(slots))
    for i, of_slot in expected.items():
        assert close(o[i], of_slot, 2e-6), f"row {i}"


def test_short_rows_are_the_same_bits_beside_long_ones(monkeypatch, request):
    mixer, slots = make_mixer("qwen"), [3, 0, 5, 4, 1, 2]
    paged = Paged(SPECS["qwen"], RAGGED, torch.float32, 1)
    projected = drawn(mixer, len(slots), torch.float32)
    whole = attention_step(mixer, projected, paged.state, torch.tensor(slots))
    request.getfixturevalue("short_is_long")
    o = attention_step(mixer, projected, paged.state, torch.tensor(slots))
    same = [torch.equal(*rows) for rows in zip(o, whole, strict=True)]
    assert same == [RAGGED[slot] < 128 for slot in slots], "long ones are in pieces, short ones are not"


@pytest.mark.parametrize("programs", [2, 60])
@pytest.mark.usefixtures("short_is_long")
def test_a_long_row_does_not_depend_on_the_others(monkeypatch, programs):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    monkeypatch.setattr(module, "LONG_PROGRAMS", programs)
    mixer, paged = make_mixer("qwen"), Paged(SPECS["qwen"], RAGGED, torch.float32, 1)
    projected = drawn(mixer, 3, torch.float32)
    among_long = attention_step(mixer, projected, paged.state, torch.tensor([4, 3, 0]))
    among_short = attention_step(mixer, projected, paged.state, torch.tensor([5, 2, 0]))
    assert torch.equal(among_long[2], among_short[2])


@triton.jit
def shares(out, splits, most_splits, whole: tl.constexpr, count: tl.constexpr):
    """The splits of rows of 1 to `count` blocks, in pieces of a block at least."""
    at = tl.arange(0, count)
    tl.store(out + at, share_of(at + 1, splits, most_splits, whole, 1))


def test_splits_cover_all_blocks_once():
    blocks = torch.arange(512, dtype=torch.int32) + 1
    for splits, further, whole in itertools.product((1, 2, 5, 128), (0, 1, 60), (1, 4)):
        share = torch.zeros_like(blocks)
        shares[(1,)](share, splits, splits + further, whole, len(blocks))
        taken = -(-blocks // share)
        assert (share > 0).all() and (taken <= splits + further).all()
        assert (taken <= splits)[blocks <= splits * whole].all(), (
            "where no further programs are meant to help"
        )
