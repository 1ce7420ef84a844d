"""Widths, and a criterion over all layers and heads."""

import numpy as np
import pytest
import torch
from checkpoints import GATED, random_tensors, write_checkpoint

from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from pruning.calibration import Origin
from pruning.collection import collect
from pruning.criteria import CRITERIA, Choice
from pruning.errors import PruningError
from pruning.gradients import GRADIENTS
from pruning.selection import Selection, select, widths_for_ratio, widths_to_keep
from pruning.statistics import Statistics

WINDOWS = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0))
ORIGIN = Origin("t", "0" * 64, 0, 4, 32, tokens_sha256="0" * 64)


def spec_of(d_k, d_v=24):
    widths = d_k if isinstance(d_k, list) else [d_k] * 3
    config = {**GATED, "head_dim": widths, "expand_v": [d_v / n for n in widths]}
    return family_of(config).spec(config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "c", GATED))


@pytest.fixture(scope="module")
def statistics(checkpoint):
    return collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256, needed=GRADIENTS)


@pytest.mark.parametrize(
    ("d_k", "ratio", "kept"),
    [
        (80, 0.8, 16),
        (80, 0.2, 64),
        (128, 0.5, 64),
        (128, 0.75, 32),
        (96, 1 / 3, 64),
        (10, 0.7, 3),
        (64, 0.001, 64),
    ],
)
def test_ratio_is_the_share_removed_without_float_floor(d_k, ratio, kept):
    assert widths_for_ratio(spec_of(d_k), ratio) == (kept,) * 3


def test_every_percent_of_every_width_is_rounded_as_whole_numbers():
    for d_k in range(1, 257):
        spec = spec_of(d_k, d_v=d_k)
        for percent in range(1, 100):
            low, rest = divmod(d_k * (100 - percent), 100)
            expected = low + (rest > 50 or (rest == 50 and low % 2))  # halves to even
            if expected:
                assert widths_for_ratio(spec, percent / 100) == (expected,) * 3, (d_k, percent)


def test_ratio_is_of_each_layer():
    assert widths_for_ratio(spec_of([32, 16, 8]), 0.5) == (16, 8, 4)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(PruningError, match=f"ratio={ratio} must be above 0 and below 1"):
        widths_for_ratio(spec_of(32), ratio)


def test_ratio_that_leaves_nothing_is_refused():
    with pytest.raises(PruningError, match=r"ratio=0\.99 leaves no channel of the 8 in layer 2"):
        widths_for_ratio(spec_of([128, 128, 8]), 0.99)


def test_keep_is_checked_against_every_layer():
    assert widths_to_keep(spec_of(32), 32) == (32, 32, 32)
    for keep in (0, -3, 33):
        with pytest.raises(PruningError, match=f"keep={keep} must be between 1 and 32, the d_k of layer 0"):
            widths_to_keep(spec_of(32), keep)
    with pytest.raises(PruningError, match="keep=20 must be between 1 and 16, the d_k of layer 1"):
        widths_to_keep(spec_of([32, 16, 8]), 20)


@pytest.mark.parametrize("name", CRITERIA)
def test_layers_may_get_different_widths(checkpoint, statistics, name):
    selection = select(checkpoint, CRITERIA[name], (4, 32, 9), statistics=statistics)
    assert selection.d_k == (4, 32, 9)
    assert [cut.keep.shape for cut in selection.cuts] == [(2, 4), (2, 32), (2, 9)]
    assert all(cut.keep.dtype == torch.int64 for cut in selection.cuts)
    assert [len(layer) for layer in selection.report] == [2, 2, 2]


class Spy:
    """Keeps the first n channels and remembers what it was shown."""

    name = "spy"
    summary = ""

    def __init__(self, statistics=(), weights=False):
        self.statistics, self.weights, self.heads = statistics, weights, []

    def select(self, head, n):
        self.heads.append(head)
        return Choice(np.arange(n), {"n": n})


def test_a_criterion_sees_its_own_head_and_only_what_it_asked_for(checkpoint, statistics):
    per_head = ("k", "q_normalised", "q_gradient", "gate_fisher")
    spy = Spy(statistics=(*per_head, "x_squares"), weights=True)
    select(checkpoint, spy, (4, 4, 4), statistics=statistics, seed=5)
    assert [(h.layer, h.index, h.d_k, h.seed) for h in spy.heads] == [
        (layer, h, 32, 5) for layer in range(3) for h in range(2)
    ]
    for head in spy.heads:
        assert set(head.statistics) == {*per_head, "x_squares"}
        layer = statistics.layers[head.layer]
        for name in per_head:
            assert np.array_equal(head.statistics[name], layer[name][head.index].numpy())
        assert np.array_equal(head.statistics["x_squares"], layer["x_squares"].numpy())
        rows = slice(head.index * 32, (head.index + 1) * 32)
        for ours, name in zip(head.weights, "qk", strict=True):
            theirs = checkpoint.tensor(f"model.layers.{head.layer}.attn.{name}_proj.weight")[rows]
            assert np.array_equal(ours, theirs.numpy())
    plain = Spy()
    select(checkpoint, plain, (4, 4, 4))
    assert all(h.statistics == {} and h.weights is None for h in plain.heads)


def test_statistics_must_be_there_and_of_this_checkpoint(checkpoint, statistics):
    with pytest.raises(PruningError, match="method='drrqr' needs calibration statistics"):
        select(checkpoint, CRITERIA["drrqr"], (4, 4, 4))
    without = collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256)
    with pytest.raises(
        PruningError,
        match="do not hold gate_fisher, .*'loss-aware' reads; calibrate again with --method loss-aware",
    ):
        select(checkpoint, CRITERIA["loss-aware"], (4, 4, 4), statistics=without)
    other = Statistics("f" * 64, statistics.origins, statistics.layers)
    with pytest.raises(PruningError, match="calibrate it again"):
        select(checkpoint, CRITERIA["drrqr"], (4, 4, 4), statistics=other)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_layer_s_width_changes_no_other_layer_s_choice(checkpoint, statistics, name):
    first = select(checkpoint, CRITERIA[name], (7, 7, 7), statistics=statistics, seed=1)
    third = select(checkpoint, CRITERIA[name], (3, 7, 7), statistics=statistics, seed=1)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(first.cuts[1:], third.cuts[1:], strict=True))


@pytest.fixture(scope="module")
def two_threads(checkpoint):
    """Statistics that were collected on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256, needed=GRADIENTS)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CRITERIA)
def test_choice_does_not_depend_on_the_number_of_threads(checkpoint, statistics, two_threads, name):
    threads = torch.get_num_threads()
    one = select(checkpoint, CRITERIA[name], (7, 7, 7), statistics=statistics, seed=1)
    torch.set_num_threads(2)
    try:
        two = select(checkpoint, CRITERIA[name], (7, 7, 7), statistics=two_threads, seed=1)
    finally:
        torch.set_num_threads(threads)
    same_choice(one, two)


def same_choice(a, b):
    assert all(torch.equal(x.keep, y.keep) for x, y in zip(a.cuts, b.cuts, strict=True))
    for x, y in ((x.rotation, y.rotation) for x, y in zip(a.cuts, b.cuts, strict=True)):
        # Float32 forwards on other threads differ in the last bits, and so do the rotations made from them.
        assert (x is None and y is None) or torch.allclose(x, y, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """The same model with its two key heads, and their value heads, in the other order; and its statistics."""
    tensors = random_tensors(GATED)
    for name, t in tensors.items():
        if ".attn." in name and not name.endswith("o_norm.weight"):
            dim = 1 if name.endswith("o_proj.weight") else 0
            tensors[name] = torch.cat(t.chunk(2, dim)[::-1], dim).contiguous()
    path = write_checkpoint(tmp_path_factory.mktemp("c") / "swapped", GATED, tensors)
    checkpoint = open_checkpoint(path)
    return checkpoint, collect(
        checkpoint.load(dtype=torch.float64), WINDOWS, ORIGIN, checkpoint.sha256, needed=GRADIENTS
    )


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_choice_goes_with_the_head_wherever_it_stands(checkpoint, swapped, name):
    """`random` draws by the head's number, and so by its place; it takes no other."""
    other, other_statistics = swapped
    statistics = collect(
        checkpoint.load(dtype=torch.float64), WINDOWS, ORIGIN, checkpoint.sha256, needed=GRADIENTS
    )
    a = select(checkpoint, CRITERIA[name], (7, 7, 7), statistics=statistics)
    b = select(other, CRITERIA[name], (7, 7, 7), statistics=other_statistics)
    assert all(torch.equal(x.keep, y.keep.flip(0)) for x, y in zip(a.cuts, b.cuts, strict=True))
    assert name == "pca" or not all(torch.equal(x.keep, x.keep.flip(0)) for x in a.cuts)


def test_a_common_factor_on_the_statistics_changes_no_choice(checkpoint, statistics):
    doubled = Statistics(
        statistics.source_sha256,
        statistics.origins,
        {i: {name: 2 * layer[name] for name in layer} for i, layer in statistics.layers.items()},
    )
    for name in CRITERIA:
        a = select(checkpoint, CRITERIA[name], (7, 7, 7), statistics=statistics)
        b = select(checkpoint, CRITERIA[name], (7, 7, 7), statistics=doubled)
        assert all(torch.equal(x.keep, y.keep) for x, y in zip(a.cuts, b.cuts, strict=True))


@pytest.mark.parametrize(
    ("reports", "exchanges"),
    [
        ([[{"exchanges": 2}, {"exchanges": 0}], [{"exchanges": 3}]], 5),
        ([[{"swaps": 1, "rank": 8}]], 1),
        ([[{"exchanges": 0}]], 0),
        ([[{"score": 1.5}], [{}]], None),
    ],
)
def test_exchanges_are_summed_over_heads(reports, exchanges):
    assert Selection((), reports).exchanges == exchanges
