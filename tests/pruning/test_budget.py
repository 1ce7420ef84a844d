"""Bytes -> widths: sizes, alignment, measured curves, and a greedy that finds what an exhaustive search finds."""

import itertools
import math

import numpy as np
import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint

from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from pruning.budget import (
    aligned_widths,
    curve_passes,
    error_curves,
    parse_bytes,
    reduced_alone,
    spend,
    widths_for_bytes,
    widths_per_layer,
)
from pruning.calibration import Origin
from pruning.collection import collect
from pruning.criteria import CRITERIA, Choice
from pruning.errors import PruningError
from pruning.evaluation import perplexity
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select
from pruning.surgery import Cut

ORIGIN = Origin("t", "0" * 64, 0, 4, 40, tokens_sha256="0" * 64)
WINDOWS = torch.randint(0, 257, (4, 40), generator=torch.Generator().manual_seed(0))
SPEC = family_of(GATED).spec({**GATED, "head_dim": 128, "expand_v": 1.0})


def state_bytes(spec, widths):
    return spec.with_d_k(tuple(widths)).state_bytes(0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("430080", 430080),
        ("13MB", 13_000_000),
        ("13 mb", 13_000_000),
        ("0.7K", 700),
        ("1.5GiB", 3 << 29),
        ("2Ki", 2048),
        ("1.001K", 1001),  # 1000.9999999999999 in floats
    ],
)
def test_sizes_with_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "13 XB", "-5", "1e6", "nan", "13MBs", "1,000"])
def test_other_sizes_are_refused(text):
    with pytest.raises(PruningError, match="is no size; give bytes or a number with a unit, like 13MB"):
        parse_bytes(text)


def test_aligned_widths_end_with_the_layer_s_own():
    assert aligned_widths(64, 16) == (16, 32, 48, 64)
    assert aligned_widths(20, 8) == (8, 16, 20)
    assert aligned_widths(12, 16) == (12,)
    for align in (0, 1, 15, -2):
        with pytest.raises(PruningError, match=f"align={align} must be an even number of at least 2"):
            aligned_widths(64, align)


def test_the_largest_width_within_the_bytes():
    for n in range(16, 129, 16):
        exact = state_bytes(SPEC, (n,) * 3)
        assert widths_for_bytes(SPEC, exact, 16) == (n,) * 3
        if n < 128:
            assert widths_for_bytes(SPEC, state_bytes(SPEC, (n + 16,) * 3) - 1, 16) == (n,) * 3
    exact = state_bytes(SPEC, (24,) * 3)
    assert widths_for_bytes(SPEC, exact, 16) == (16,) * 3
    assert widths_for_bytes(SPEC, exact, 8) == (24,) * 3
    assert widths_for_bytes(SPEC, 10**12, 16) == (128,) * 3
    smallest = state_bytes(SPEC, (16,) * 3)
    with pytest.raises(PruningError, match=rf"{smallest - 1} is below {smallest}, the state with d_k 16"):
        widths_for_bytes(SPEC, smallest - 1, 16)


def convex(generator, widths):
    """A falling convex curve that ends at 0, as measured ones roughly are."""
    steps = np.sort(generator.random(len(widths) - 1) * generator.choice([0.02, 0.2, 1.0]))
    rises = np.concatenate([[0.0], np.cumsum(steps)])[::-1]
    return {n: float(rise) for n, rise in zip(widths, rises, strict=True)}


def test_no_other_widths_of_the_same_state_lose_less():
    widths = aligned_widths(128, 32)
    for seed in range(20):
        curves = [convex(np.random.default_rng([seed, layer]), widths) for layer in range(3)]
        for mean in (32, 64, 80, 112):
            limit = state_bytes(SPEC, (mean,) * 3)
            found = widths_per_layer(SPEC, curves, limit)
            assert state_bytes(SPEC, found) <= limit
            best = min(
                sum(curve[n] for curve, n in zip(curves, other, strict=True))
                for other in itertools.product(widths, repeat=3)
                if state_bytes(SPEC, other) <= limit
            )
            assert sum(c[n] for c, n in zip(curves, found, strict=True)) == pytest.approx(best, abs=1e-12)


def test_budget_goes_to_the_layer_that_needs_it():
    flat = {16: 0.001, 32: 0.0005, 64: 0.0002, 128: 0.0}
    steep = {16: 0.3, 32: 0.15, 64: 0.04, 128: 0.0}
    assert widths_per_layer(SPEC, [flat, flat, steep], state_bytes(SPEC, (64,) * 3)) == (32, 32, 128)


def test_a_flat_stretch_hides_nothing_and_a_widening_without_gain_is_not_made():
    # No gain from 16 to 32, all of it from 64: one step at a time would never get there.
    step = {16: 0.3, 32: 0.3, 64: 0.0, 128: 0.0}
    harmless = {16: 0.0, 32: 0.0, 64: 0.0, 128: 0.0}
    assert widths_per_layer(SPEC, [harmless, step, harmless], state_bytes(SPEC, (64,) * 3)) == (16, 64, 16)


def test_bytes_count_not_channels():
    # A layer's channels may cost more than another's: with twice the value heads here, per head the same loss.
    wide = SPEC.layers[0].mixer
    assert wide.num_v_heads == 4
    spec = type(SPEC)(
        **{
            **vars(SPEC),
            "layers": (
                SPEC.layers[0],
                type(SPEC.layers[0])(
                    type(wide)(**{**vars(wide), "num_v_heads": 2}), SPEC.layers[1].ffn, SPEC.norm
                ),
            ),
        }
    )
    curve = {64: 0.11, 128: 0.0}
    limit = state_bytes(spec, (128, 64))
    assert widths_per_layer(spec, [curve, {64: 0.1, 128: 0.0}], limit) == (64, 128)


def test_a_limit_below_the_smallest_widths_is_refused():
    curves = [{16: 0.1, 128: 0.0}] * 3
    with pytest.raises(
        PruningError, match=r"state_bytes=1000 is below .* allow narrower widths with --align"
    ):
        widths_per_layer(SPEC, curves, 1000)


@pytest.fixture(params=[GATED, DELTA], ids=["gated", "delta"], scope="module")
def checkpoint(request, tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("b") / "c", request.param))


@pytest.fixture(scope="module")
def statistics(checkpoint):
    return collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256)


def test_curves_are_the_losses_of_checkpoints_with_one_layer_reduced(checkpoint, statistics, tmp_path):
    d_k = checkpoint.spec.d_k[0]
    model = checkpoint.load()
    eps = [block.mixer.o_norm.eps for block in model.layers]
    choices = [select(checkpoint, CRITERIA["bilinear"], (n,) * 3, statistics=statistics) for n in (4, 8, d_k)]
    steps = []
    curves = error_curves(model, choices, WINDOWS, advance=steps.append)
    assert sum(steps) == 7 * WINDOWS[:, 1:].numel()
    assert [block.mixer.o_norm.eps for block in model.layers] == eps
    dense = perplexity(model, WINDOWS).loss
    for layer, curve in enumerate(curves):
        assert list(curve) == [4, 8, d_k]
        assert curve[d_k] == 0.0
        for n in (4, 8):
            widths = tuple(n if i == layer else d_k for i in range(3))
            selection = select(checkpoint, CRITERIA["bilinear"], widths, statistics=statistics)
            out = tmp_path / f"{layer}-{n}"
            reduce_checkpoint(checkpoint, selection, Provenance("bilinear", 0, statistics), out)
            loss = perplexity(open_checkpoint(out).load(), WINDOWS).loss
            assert abs(loss - dense) > 1e-4, "or nothing is compared"
            assert curve[n] == pytest.approx(loss - dense, abs=2e-6)  # fp32 losses of about 6


def test_a_reduced_layer_is_itself_again_after_a_failure(checkpoint):
    mixer = checkpoint.load().deltas[1]
    keep = torch.tensor([[0, 3]]).expand(mixer.spec.num_k_heads, 2)
    before = mixer.o_norm.eps

    def fail():
        with reduced_alone(mixer, Cut(1, keep)):
            assert mixer.o_norm.eps == pytest.approx(before * 2 / mixer.spec.d_k)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert mixer.o_norm.eps == before


def test_spend_measures_every_aligned_width_and_stays_within_the_limit(checkpoint, statistics):
    spec = checkpoint.spec
    own = spec.d_k[0]
    limit = state_bytes(spec, (own // 2,) * 3)
    steps = []
    widths, budget = spend(
        checkpoint,
        CRITERIA["bilinear"],
        limit,
        4,
        checkpoint.load(),
        WINDOWS,
        ORIGIN,
        statistics=statistics,
        advance=steps.append,
    )
    assert [tuple(curve) for curve in budget.curves] == [aligned_widths(own, 4)] * 3
    assert sum(steps) == curve_passes(spec, 4) * WINDOWS[:, 1:].numel()
    assert widths == widths_per_layer(spec, budget.curves, limit)
    assert state_bytes(spec, widths) <= limit
    rises = [budget.curves[i][n] for i, n in enumerate(widths)]
    assert sum(rises) <= sum(curve[own // 2] for curve in budget.curves)
    assert all(math.isfinite(rise) for rise in rises)
    record = budget.as_json()
    assert (record["state_bytes"], record["align"]) == (limit, 4)
    assert record["measured_on"] == ORIGIN.as_json()
    assert record["loss_rise"][1] == {str(n): rise for n, rise in budget.curves[1].items()}


class Strict:
    """Takes no width that a head does not have."""

    name, summary, statistics, weights, mixes = "strict", "", (), False, False

    def select(self, head, n):
        assert 1 <= n <= head.d_k
        return Choice(np.arange(n))


def test_layers_that_are_narrower_already_keep_their_own_width(tmp_path):
    config = {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", config))
    assert curve_passes(checkpoint.spec, 8) == 1 + 3 + 0 + 2
    limit = state_bytes(checkpoint.spec, (16, 8, 16))
    widths, budget = spend(checkpoint, Strict(), limit, 8, checkpoint.load(), WINDOWS, ORIGIN)
    assert [tuple(curve) for curve in budget.curves] == [(8, 16, 24, 32), (8,), (8, 16, 20)]
    assert widths[1] == 8


def test_windows_of_one_token_measure_nothing(checkpoint):
    with pytest.raises(PruningError, match="window_length=1 leaves no token to predict"):
        error_curves(checkpoint.load(), [], WINDOWS[:, :1])
