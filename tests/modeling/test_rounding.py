"""States in 8 bits: what is kept, how near it is, and what becomes of columns that can't be kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.state.rounding import LEVELS, SMALLEST, narrow, widen


@settings(max_examples=60, deadline=None)
@given(
    d_k=st.integers(1, 40),
    d_v=st.integers(1, 40),
    exponent=st.integers(-90, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 100),
)
def test_every_entry_is_the_nearest_multiple_of_its_columns_scale(d_k, d_v, exponent, dtype, seed):
    torch.manual_seed(seed)
    state = (torch.randn(2, 3, d_k, d_v, dtype=torch.float64) * 2.0**exponent).to(dtype)
    codes, scales = narrow(state)
    assert (codes.dtype, codes.shape) == (torch.int8, state.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (2, 3, d_v))
    exact = state.float().double()
    assert codes.abs().amax(-2).eq(LEVELS).all()  # the largest entry of each column is kept whole
    assert (exact.abs().amax(-2) / LEVELS - scales).abs().le(scales * 1e-6).all()
    # Half a step, and the roundings of the scale and its inverse.
    wrong = (widen(codes, scales).double() - exact).abs()
    assert wrong.le(scales.unsqueeze(-2) * 0.50002).all()


def test_a_tie_goes_to_the_even_code():
    state = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]).view(6, 1)
    codes, scales = narrow(state)
    assert codes.flatten().tolist() == [127, 0, 2, 2, 0, -2]
    assert scales.item() == pytest.approx(1.0)


def test_next_to_a_tie_one_rounding_decides():
    """The inverse of the scale is rounded once, and a product with it once: kernels do so too."""
    torch.manual_seed(0)
    largest = 127 * (1 + torch.rand(300))
    middles = torch.randint(-126, 126, (40, 300)) + 0.5
    state = torch.cat([largest[None], middles / (127 / largest)])
    codes, _ = narrow(state)
    inverse = np.float32(127) / largest.numpy()
    exact = state.numpy().astype(np.float64) * inverse.astype(np.float64)
    assert np.array_equal(codes.numpy(), np.rint(exact))


def test_what_was_rounded_stays_as_it_is():
    """A state that is read and written again with nothing added does not drift."""
    torch.manual_seed(0)
    codes, scales = narrow(torch.randn(4, 2, 33, 17))
    for _ in range(3):
        again, scales = narrow(widen(codes, scales))
        assert torch.equal(again, codes)


def test_columns_do_not_touch_each_other():
    torch.manual_seed(0)
    state = torch.randn(9, 5)
    codes, scales = narrow(state)
    state[:, 2] *= 1e9
    others = [0, 1, 3, 4]
    assert torch.equal(narrow(state)[0][:, others], codes[:, others])
    assert torch.equal(narrow(state)[1][others], scales[others])


def test_a_column_of_nothing_is_kept_as_zeros():
    state = torch.zeros(4, 3)
    state[1, 1], state[2, 2] = SMALLEST / 2, SMALLEST
    codes, scales = narrow(state)
    assert not codes[:, :2].any() and not scales[:2].any()
    assert codes[:, 2].tolist() == [0, 0, 127, 0] and scales[2] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_column_stays_broken_and_alone(value):
    torch.manual_seed(0)
    state = torch.randn(6, 4)
    state[3, 1] = value
    kept = widen(*narrow(state))
    assert not kept[:, 1].isfinite().any()
    assert kept[:, [0, 2, 3]].isfinite().all()
