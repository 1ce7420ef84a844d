"""The Triton decode step, run by Triton's interpreter, against the plain torch step in float64."""

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from specs import mixer_spec
from states import error_in_steps, exact_states, tensors

from modeling.checkpoint import open_checkpoint
from modeling.layers import DeltaMixer
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime import TorchRuntime, UnavailableError
from modeling.runtime.gpu import delta as module
from modeling.runtime.gpu import delta_int8
from modeling.runtime.gpu.delta import delta_step, zero_counters
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import StateTypes
from modeling.state import DeltaState, StatePool
from modeling.state.rounding import narrow

SPECS = {
    "gated": {},
    "gated-value-groups": {"num_k_heads": 2, "num_v_heads": 4, "d_v": 8},
    "gated-odd": {"d_k": 13, "d_v": 24, "gate": "sigmoid", "conv_bias": True},
    "gated-d_k-48": {"d_k": 48, "conv_kernel": 3},
    "gated-d_k-1": {"d_k": 1, "num_v_heads": 3, "gate": "none"},
    "gated-wide": {"d_k": 96, "d_v": 40},
    "delta": {"has_decay": False, "gate": "none", "num_k_heads": 3, "num_v_heads": 3},
    "delta-no-beta": {"has_decay": False, "has_beta": False, "d_k": 20, "conv_kernel": 2},
    "delta-neg-eigval": {"has_decay": False, "beta_scale": 2.0, "conv_bias": True, "d_v": 5},
    "no-convolution": {"conv_kernel": 1},
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Arithmetic is in float32, and what is stored is rounded once: the interpreter cuts bfloat16 off, a GPU rounds it."""
SLOTS = [4, 0, 3]
POOL = 6
HIDDEN = 8


def make_mixer(changes: dict, dtype: torch.dtype = torch.float32) -> DeltaMixer:
    """Weights of the given dtype; what a checkpoint keeps in float32 stays so."""
    spec = mixer_spec(**changes)
    mixer = DeltaMixer(spec, HIDDEN, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (1 if name == "o_norm.weight" else 0))
    mixer.conv.to(dtype)
    return mixer.requires_grad_(False)


def draw(mixer: DeltaMixer, dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    s = mixer.spec
    torch.manual_seed(1)
    projected = torch.randn(len(SLOTS), sum(s.in_proj_sizes)).to(dtype)
    recurrent = torch.randn(POOL, s.num_v_heads, s.d_k, s.d_v).to(state_dtype)
    conv = torch.randn(POOL, s.conv_channels, s.conv_kernel - 1).to(dtype)
    return projected, recurrent, conv


def reference(mixer: DeltaMixer, projected, recurrent, conv, slots):
    """DeltaMixer.step in float64 on copies: o and the two pools after it."""
    exact = DeltaMixer(mixer.spec, HIDDEN, 0).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    recurrent, conv = recurrent.double(), conv.double()
    with torch.no_grad():
        o = exact.step(projected.double(), DeltaState(recurrent, conv), slots)
    return o, recurrent, conv


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm()) if b.numel() else 0.0


def check_int8(mixer: DeltaMixer, dtype: torch.dtype, *, steps: int = 2) -> None:
    """A step is that of float64 on the same numbers, rounded."""
    projected, wide, conv = draw(mixer, dtype, torch.float32)
    codes, scales = narrow(wide)
    state, slots = DeltaState(codes, conv, scales), torch.tensor(SLOTS)
    others = [i for i in range(POOL) if i not in SLOTS]
    for _ in range(steps):
        before = codes[others].clone(), scales[others].clone()
        expected, after, _ = reference(mixer, projected, exact_states(state).recurrent, conv, slots)
        o = delta_step(mixer, projected, state, slots)
        assert o.dtype == dtype and error(o, expected) < TOLERANCE[dtype]
        assert error_in_steps(DeltaState(codes[slots], conv, scales[slots]), after[slots]) < 0.01
        assert torch.equal(codes[others], before[0]) and torch.equal(scales[others], before[1])
        projected = projected.roll(1, 0)


def check(mixer: DeltaMixer, dtype: torch.dtype, state_dtype: torch.dtype, *, steps: int = 2) -> None:
    projected, recurrent, conv = draw(mixer, dtype, state_dtype)
    slots = torch.tensor(SLOTS)
    others = [i for i in range(POOL) if i not in SLOTS]
    for _ in range(steps):
        before = recurrent[others].clone(), conv[others].clone()
        expected = reference(mixer, projected, recurrent, conv, slots)
        o = delta_step(mixer, projected, DeltaState(recurrent, conv), slots)
        assert o.dtype == dtype and o.shape == (len(SLOTS), mixer.spec.value_dim)
        assert error(o, expected[0]) < TOLERANCE[dtype]
        assert error(recurrent, expected[1]) < TOLERANCE[state_dtype]
        assert torch.equal(conv.double(), expected[2])
        assert torch.equal(recurrent[others], before[0]) and torch.equal(conv[others], before[1])
        projected = projected.roll(1, 0)


@pytest.mark.parametrize("name", SPECS)
def test_matches_the_float64_step(name):
    check(make_mixer(SPECS[name]), torch.float32, torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gated-value-groups", "delta"])
def test_bfloat16_activations_and_states(name, state_dtype):
    check(make_mixer(SPECS[name], torch.bfloat16), torch.bfloat16, state_dtype)


@pytest.mark.parametrize("most", [0, 8], ids=["in-turns", "in-programs-of-their-own"])
def test_value_heads_of_a_key_head_share_its_history(monkeypatch, most):
    """One of their programs moves it on, when all have read it."""
    monkeypatch.setattr(module, "MOST_ROWS_IN_PARALLEL", most)
    check(make_mixer({"num_k_heads": 2, "num_v_heads": 6}), torch.float32, torch.float32, steps=3)
    assert not zero_counters(torch.device("cpu"), len(SLOTS) * 2).any()


@pytest.mark.parametrize("name", SPECS)
def test_states_in_8_bits_are_those_of_float64_rounded(name):
    d_v = SPECS[name].get("d_v", 4)
    check_int8(make_mixer(SPECS[name] | {"d_v": d_v + -d_v % 4}), torch.float32)


def test_states_in_8_bits_of_a_d_v_that_is_no_multiple_of_4_are_refused(tmp_path):
    config = {**GATED, "head_dim": 10, "expand_v": 1.0}
    runtime = GpuRuntime(
        open_checkpoint(write_checkpoint(tmp_path / "c", config)).load(), chunked_gated_delta_rule
    )
    with pytest.raises(UnavailableError, match="multiple of 4, and that of layer 0 is 10; bfloat16 would do"):
        runtime.check_states(StateTypes(torch.int8))
    runtime.check_states(StateTypes(torch.bfloat16))


def test_states_in_8_bits_and_bfloat16_activations():
    check_int8(make_mixer(SPECS["gated-value-groups"], torch.bfloat16), torch.bfloat16)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy, which the interpreter computes with, warns of NaN
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_state_in_8_bits_stays_broken_and_in_its_slot(value):
    """What is NaN or Inf must not become a number: the engine tells the client by it."""
    mixer = make_mixer({})
    projected, wide, conv = draw(mixer, torch.float32, torch.float32)
    codes, scales = narrow(wide)
    state, slots = DeltaState(codes, conv, scales), torch.tensor(SLOTS)
    conv[SLOTS[1]].fill_(value)
    for _ in range(2):
        o = delta_step(mixer, projected, state, slots)
        assert o[[0, 2]].isfinite().all() and not o[1].isfinite().any()
    assert not scales[SLOTS[1]].isfinite().any() and scales[[SLOTS[0], SLOTS[2]]].isfinite().all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_v", [48, 33])
def test_a_state_too_large_for_one_tile(monkeypatch, d_v, state_dtype):
    monkeypatch.setattr(module, "TILES", {4: 16 * 16, 2: 16 * 32})
    check(make_mixer({"d_v": d_v, "num_v_heads": 2}), torch.float32, state_dtype, steps=1)


@pytest.mark.parametrize("d_v", [48, 36])
def test_a_state_in_8_bits_too_large_for_one_tile(monkeypatch, d_v):
    monkeypatch.setattr(delta_int8, "TILE", 16 * 16)
    check_int8(make_mixer({"d_v": d_v, "num_v_heads": 2}), torch.float32, steps=1)


def test_rows_of_a_wider_buffer():
    """CUDA graphs run on the first rows of a buffer; a projection may be a slice of a wider one."""
    mixer = make_mixer({})
    projected, recurrent, conv = draw(mixer, torch.float32, torch.float32)
    slots = torch.tensor(SLOTS)
    expected = reference(mixer, projected, recurrent, conv, slots)
    wider = torch.cat([projected, torch.full_like(projected, torch.nan)], dim=1)
    o = delta_step(mixer, wider[:, : projected.shape[1]], DeltaState(recurrent, conv), slots)
    assert error(o, expected[0]) < 2e-6


def test_padding_on_one_null_slot_leaves_the_others_alone():
    mixer = make_mixer({"num_k_heads": 2, "num_v_heads": 2})
    projected, recurrent, conv = draw(mixer, torch.float32, torch.float32)
    slots = torch.tensor([5, 2, 5])
    expected = reference(mixer, projected[1:2], recurrent, conv, slots[1:2])
    o = delta_step(mixer, projected, DeltaState(recurrent, conv), slots)
    assert error(o[1:2], expected[0]) < 2e-6
    assert error(recurrent[:5], expected[1][:5]) < 2e-6


def test_float64_is_refused():
    mixer = make_mixer({})
    projected, recurrent, conv = draw(mixer, torch.float64, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        delta_step(mixer, projected, DeltaState(recurrent, conv), torch.tensor(SLOTS))


@pytest.mark.parametrize("config", [{**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]}, DELTA])
@torch.inference_mode()
def test_a_whole_model_whose_layers_differ(tmp_path, config):
    model = open_checkpoint(write_checkpoint(tmp_path / "c", config)).load()
    pools = [StatePool(model.spec, 3) for _ in range(2)]
    torch.manual_seed(0)
    for ours, theirs in zip(*([*tensors(p)] for p in pools), strict=True):
        ours.copy_(torch.randn_like(ours) * 0.1)
        theirs.copy_(ours)
    slots = torch.tensor([2, 0])
    for _ in range(2):
        ids = torch.randint(0, 257, (2,))
        expected = TorchRuntime(model).decode(ids, pools[0], slots)
        hidden = GpuRuntime(model, chunked_gated_delta_rule).decode(ids, pools[1], slots)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
