"""The Triton kernels of packed prompts, run by Triton's interpreter, against plain torch in float64."""

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from specs import mixer_spec
from states import tensors

from modeling.checkpoint import open_checkpoint
from modeling.layers import DeltaMixer
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime import TorchRuntime
from modeling.runtime.gpu import prefill as module
from modeling.runtime.gpu.packing import packing
from modeling.runtime.gpu.prefill import (
    GATES_BLOCK,
    add_delta_prefill,
    delta_gates,
    delta_heads,
    normed_output,
)
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import TOKEN_BLOCK
from modeling.state import DeltaState, StatePool
from modeling.state.rounding import narrow, widen

SPECS = {
    "plain": {},
    "value-groups": {"num_k_heads": 2, "num_v_heads": 4, "d_v": 8},
    "odd": {"d_k": 13, "d_v": 21, "conv_bias": True},
    "wide-k": {"d_k": 40, "d_v": 5, "conv_kernel": 3, "num_k_heads": 3, "num_v_heads": 3},
    "d_k-1": {"d_k": 1, "num_v_heads": 3, "conv_kernel": 2},
    "no-convolution": {"conv_kernel": 1},
}
LENGTHS = {
    "one token": [1],
    "shorter than the filter": [2, 1, 3],
    "a chunk": [TOKEN_BLOCK],
    "ragged": [1, TOKEN_BLOCK + 1, 2, 2 * TOKEN_BLOCK + 3],
}


def offsets_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def make_mixer(changes: dict, dtype: torch.dtype = torch.float32) -> DeltaMixer:
    mixer = DeltaMixer(mixer_spec(**changes), 8, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    mixer.conv.to(dtype)
    return mixer.requires_grad_(False)


def exact_mixer(mixer: DeltaMixer) -> DeltaMixer:
    exact = DeltaMixer(mixer.spec, 8, 0).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    return exact.requires_grad_(False)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""The interpreter cuts bfloat16 off."""


def check(mixer: DeltaMixer, lengths: list[int], dtype: torch.dtype, *, before: bool) -> None:
    s = mixer.spec
    torch.manual_seed(1)
    # A projection's q, k and v are the first columns of wider rows.
    projected = torch.randn(sum(lengths), s.conv_channels + 7).to(dtype)
    projected[:, s.conv_channels :] = torch.nan
    pool = torch.randn(len(lengths) + 2, s.conv_channels, s.conv_kernel - 1).to(dtype) * before
    kept, slots = pool.clone(), torch.randperm(len(lengths) + 2)[: len(lengths)]
    expected = exact_mixer(mixer).heads(
        projected[:, : s.conv_channels].double(), offsets_of(lengths), pool[slots].double()
    )
    made = delta_heads(mixer, projected, offsets_of(lengths), pool, slots)
    for name, ours, theirs in zip("qkv", made, expected, strict=False):
        assert ours.dtype == dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert error(ours, theirs) < TOLERANCE[dtype], name
    assert made[3].shape == expected[3].shape and torch.equal(made[3].double(), expected[3])
    assert torch.equal(pool, kept), "only the caller moves the pool on"


@pytest.mark.parametrize("before", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matches_the_float64_convolution(lengths, before):
    check(make_mixer(SPECS["value-groups"]), LENGTHS[lengths], torch.float32, before=before)


@pytest.mark.parametrize("before", [False, True], ids=["from nothing", "from a state"])
@pytest.mark.parametrize("name", SPECS)
def test_any_shape(name, before):
    check(make_mixer(SPECS[name]), [3, TOKEN_BLOCK + 2], torch.float32, before=before)


@pytest.mark.parametrize("before", [False, True], ids=["from nothing", "from a state"])
def test_bfloat16(before):
    check(make_mixer(SPECS["odd"], torch.bfloat16), [2, TOKEN_BLOCK + 5], torch.bfloat16, before=before)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        delta_heads(
            make_mixer({}),
            torch.zeros(1, 48, dtype=torch.float64),
            [0, 1],
            torch.zeros(1, 48, 3),
            torch.zeros(1, dtype=torch.long),
        )


GATES = {
    "gated": {},
    "many heads": {"num_k_heads": 3, "num_v_heads": 9, "d_v": 5},
    "sigmoid": {"gate": "sigmoid", "num_v_heads": 2, "d_v": 33},
    "no gate": {"gate": "none", "num_v_heads": 3},
    "no decay": {"has_decay": False, "beta_scale": 2.0},
    "no beta": {"has_beta": False, "num_v_heads": 5},
    "neither": {"has_beta": False, "has_decay": False, "beta_scale": 2.0},
}


def projection(mixer: DeltaMixer, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the input projection, of which what nobody here may read is not a number."""
    torch.manual_seed(2)
    projected = 4 * torch.randn(tokens, sum(mixer.spec.in_proj_sizes)).to(dtype)
    projected[:, : mixer.spec.conv_channels] = torch.nan
    return projected


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, GATES_BLOCK, 2 * GATES_BLOCK + 3])
@pytest.mark.parametrize("name", GATES)
def test_gates(name, tokens, dtype):
    mixer = make_mixer(GATES[name])
    projected = projection(mixer, tokens, dtype)
    *_, beta_in, decay_in = projected.double().split(mixer.spec.in_proj_sizes, dim=-1)
    for ours, theirs in zip(
        delta_gates(mixer, projected), exact_mixer(mixer).gates(beta_in, decay_in), strict=True
    ):
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert error(ours, theirs) < 2e-6


def test_gates_of_large_and_small_inputs():
    """Where softplus is its argument, and where it is next to nothing."""
    mixer = make_mixer({"num_v_heads": 4})
    projected = projection(mixer, 2, torch.float32)
    projected[:, -4:] = torch.tensor([90.0, 19.5, -19.5, -90.0])
    _, g = delta_gates(mixer, projected)
    _, expected = exact_mixer(mixer).gates(projected[:, -8:-4].double(), projected[:, -4:].double())
    torch.testing.assert_close(g.double(), expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("o_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", GATES)
def test_gated_norm(name, dtype, o_dtype):
    mixer = make_mixer(GATES[name])
    s = mixer.spec
    projected = projection(mixer, 3, dtype)
    o = torch.randn(3, s.num_v_heads, s.d_v).to(o_dtype)
    gate = projected.split(s.in_proj_sizes, dim=-1)[1]
    expected = exact_mixer(mixer).gated_norm(o.double(), gate.double())
    ours = normed_output(mixer, o, projected)
    assert ours.dtype == dtype and ours.shape == expected.shape
    assert error(ours, expected) < TOLERANCE[dtype]


def test_gated_norm_of_more_heads_than_one_program_holds(monkeypatch):
    monkeypatch.setattr(module, "NORM_ELEMENTS", 16)
    mixer = make_mixer({"num_v_heads": 5, "d_v": 6})
    s = mixer.spec
    projected = projection(mixer, 4, torch.float32)
    o = torch.randn(4, s.num_v_heads, s.d_v)
    gate = projected.split(s.in_proj_sizes, dim=-1)[1]
    expected = exact_mixer(mixer).gated_norm(o.double(), gate.double())
    assert error(normed_output(mixer, o, projected), expected) < 2e-6


def test_where_packed_sequences_lie():
    packed = packing([0, 1, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 2], torch.device("cpu"))
    assert packed.offsets.tolist() == [0, 1, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 2]
    assert packed.chunks.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1]]
    assert packed.chunk_offsets.tolist() == [0, 1, 2, 4]
    assert packing([0, 1, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 2], torch.device("cpu")) is packed


@torch.inference_mode()
def test_a_prompt_in_pieces_through_a_whole_model(tmp_path):
    """Prefill, layer by layer in place on the pool, with and without the kernel, against Model.forward."""
    config = {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]}
    model = open_checkpoint(write_checkpoint(tmp_path / "c", config)).load()
    torch.manual_seed(0)
    ids = torch.randint(0, 257, (100,))
    pools = [StatePool(model.spec, 4) for _ in range(3)]
    slots = torch.tensor([2, 0])
    runtimes = [None, TorchRuntime(model), GpuRuntime(model, chunked_gated_delta_rule)]
    for first in (True, False):
        pieces = [ids[:20], ids[30:60]] if first else [ids[20:30], ids[60:100]]
        offsets = offsets_of([len(p) for p in pieces])
        hidden = []
        for runtime, pool in zip(runtimes, pools, strict=True):
            if runtime is None:
                h, state = model(torch.cat(pieces), offsets, pool.gather(slots))
                pool.scatter(slots, state)
            else:
                h = runtime.prefill(torch.cat(pieces), offsets, pool, slots)
            hidden.append(h)
        for h, pool in zip(hidden[1:], pools[1:], strict=True):
            # As a whole: what three layers make of float32's rounding differs in single elements.
            assert error(h, hidden[0]) < 2e-5
            for ours, theirs in zip(tensors(pool), tensors(pools[0]), strict=True):
                assert error(ours[slots], theirs[slots]) < 2e-5
                assert torch.equal(ours[[1, 3]], theirs[[1, 3]]), "those of nobody here"


@torch.inference_mode()
def test_a_prompt_that_goes_on_from_states_in_8_bits():
    """They are widened before the rule and rounded once after it, nothing else."""
    mixer = make_mixer(SPECS["odd"])
    s = mixer.spec
    torch.manual_seed(0)
    wide = torch.randn(4, s.num_v_heads, s.d_k, s.d_v)
    conv = torch.randn(4, s.conv_channels, s.conv_kernel - 1)
    codes, scales = narrow(wide)
    narrow_state, slots = DeltaState(codes, conv.clone(), scales), torch.tensor([2, 0])
    wide_state = DeltaState(widen(codes, scales), conv.clone())
    tokens, before = TOKEN_BLOCK + 9, (codes.clone(), scales.clone())
    x, residual = torch.randn(2, tokens, mixer.in_proj.in_features)
    where = [0, 7, tokens]
    y, expected = (
        add_delta_prefill(mixer, x, None, residual.clone(), where, state, slots, chunked_gated_delta_rule)
        for state in (narrow_state, wide_state)
    )
    assert torch.equal(y, expected) and torch.equal(narrow_state.conv, wide_state.conv)
    after = narrow(wide_state.recurrent[slots])
    assert torch.equal(codes[slots], after[0]) and torch.equal(scales[slots], after[1])
    assert torch.equal(codes[[1, 3]], before[0][[1, 3]]) and torch.equal(scales[[1, 3]], before[1][[1, 3]])
