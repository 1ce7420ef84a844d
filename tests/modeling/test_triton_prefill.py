"""The Triton convolution of packed prompts, run by Triton's interpreter, against the plain one in float64."""

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from specs import mixer_spec
from states import tensors

from modeling.checkpoint import open_checkpoint
from modeling.layers import DeltaMixer
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.delta import delta_heads
from modeling.runtime.gpu.packing import packing
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import TOKEN_BLOCK
from modeling.state import StatePool

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


def check(mixer: DeltaMixer, lengths: list[int], dtype: torch.dtype, *, before: bool) -> None:
    s = mixer.spec
    torch.manual_seed(1)
    # A projection's q, k and v are the first columns of wider rows.
    wider = torch.randn(sum(lengths), s.conv_channels + 7).to(dtype)
    wider[:, s.conv_channels :] = torch.nan
    qkv = wider[:, : s.conv_channels]
    state = torch.randn(len(lengths), s.conv_channels, s.conv_kernel - 1).to(dtype) if before else None
    exact = DeltaMixer(s, 8, 0).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    wide = None if state is None else state.double()
    with torch.no_grad():
        expected = exact.heads(qkv.double(), offsets_of(lengths), wide)
    made = delta_heads(mixer, qkv, offsets_of(lengths), state)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # the interpreter cuts bfloat16 off
    for name, ours, theirs in zip("qkv", made, expected, strict=False):
        assert ours.dtype == dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert float((ours.double() - theirs).norm() / theirs.norm()) < tolerance, name
    assert made[3].shape == expected[3].shape and torch.equal(made[3].double(), expected[3])


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
        delta_heads(make_mixer({}), torch.zeros(1, 48, dtype=torch.float64), [0, 1], None)


def test_where_packed_sequences_lie():
    packed = packing([0, 1, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 2], torch.device("cpu"))
    assert packed.offsets.tolist() == [0, 1, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 2]
    assert packed.chunks.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1]]
    assert packing([0, 1, TOKEN_BLOCK + 1, 2 * TOKEN_BLOCK + 2], torch.device("cpu")) is packed


@torch.inference_mode()
def test_a_prompt_in_pieces_through_a_whole_model(tmp_path):
    """Prefill, layer by layer in place on the pool, with and without the kernel, against Model.forward."""
    config = {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]}
    model = open_checkpoint(write_checkpoint(tmp_path / "c", config)).load()
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
            torch.testing.assert_close(h, hidden[0], rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(tensors(pool), tensors(pools[0]), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
