"""States in 8 bits around prompts, run by Triton's interpreter: bit for bit what `modeling.state.rounding` says."""

import pytest
import torch

from modeling.runtime.gpu import rounding as module
from modeling.runtime.gpu.rounding import narrow_into, widened
from modeling.state import DeltaState
from modeling.state.rounding import SMALLEST, narrow, widen

SLOTS = torch.tensor([4, 0, 3])
OTHERS = [1, 2, 5]


def states_of(heads, d_k, d_v):
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (6, heads, d_k, d_v), dtype=torch.int8)
    return DeltaState(codes, torch.empty(6, 1), torch.rand(6, heads, d_v))


@pytest.mark.parametrize("tile", [4096, 128])
@pytest.mark.parametrize(("heads", "d_k", "d_v"), [(2, 16, 32), (3, 13, 37), (1, 1, 5), (2, 48, 16)])
def test_rows_are_rounded_and_widened_as_in_torch(monkeypatch, heads, d_k, d_v, tile):
    monkeypatch.setattr(module, "TILE", tile)
    state = states_of(heads, d_k, d_v)
    before = state.recurrent.clone(), state.scales.clone()
    assert torch.equal(widened(state, SLOTS), widen(before[0][SLOTS], before[1][SLOTS]))
    wide = torch.randn(3, heads, d_k, d_v) * torch.logspace(-3, 3, d_v)
    wide[1, :, :, 0], wide[2, :, :, -1] = 0.0, SMALLEST / 3
    narrow_into(state, SLOTS, wide)
    codes, scales = narrow(wide)
    assert torch.equal(state.recurrent[SLOTS], codes) and torch.equal(state.scales[SLOTS], scales)
    assert torch.equal(state.recurrent[OTHERS], before[0][OTHERS])
    assert torch.equal(state.scales[OTHERS], before[1][OTHERS])


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy, which the interpreter computes with, warns of NaN
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_column_stays_broken_and_alone(value):
    state = states_of(2, 16, 8)
    wide = torch.randn(3, 2, 16, 8)
    wide[1, 0, 3, 2] = value
    narrow_into(state, SLOTS, wide)
    assert (~state.scales[SLOTS].isfinite()).nonzero().tolist() == [[1, 0, 2]]
    assert not widened(state, SLOTS)[1, 0, :, 2].isfinite().any()
