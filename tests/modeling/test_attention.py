"""Softmax attention, experts and norms behind, against their definitions written out token by token in float64."""

import itertools
import math

import pytest
import torch
from specs import mixer_spec

from modeling.layers import Block
from modeling.layers.attention import AttentionMixer, attend, rotate
from modeling.layers.moe import MoE
from modeling.model import Model
from modeling.runtime import TorchRuntime
from modeling.runtime.cpu import CpuRuntime
from modeling.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    StateTypes,
)
from modeling.state import PagedKV, Pages, StatePool

FLOAT64 = torch.float64
SPECS = {
    "qwen": AttentionSpec(6, 2, 16, RopeSpec(4, 1e7), "head", True, 1e-6),
    "olmo": AttentionSpec(4, 4, 8, None, "whole", False, 1e-6),
    "one-kv-head-all-rotated": AttentionSpec(3, 1, 6, RopeSpec(6, 100.0), "none", True, 1e-5),
}
MOE = MoESpec(num_experts=5, top_k=2, expert_size=7, shared_size=6)
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=FLOAT64) * p.shape[-1] ** -0.5
        if "norm" in name:
            p.data += 1
    return module.requires_grad_(False)


def rms(x, weight, eps):
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * weight


def turned(x, position, dims, theta):
    """Rotates pairs (c, c + dims / 2) of one head `[head_dim]` as complex numbers."""
    out = x.clone()
    for c in range(dims // 2):
        angle = position / theta ** (2 * c / dims)
        z = complex(x[c], x[c + dims // 2]) * complex(math.cos(angle), math.sin(angle))
        out[c], out[c + dims // 2] = z.real, z.imag
    return out


def attention_by_definition(mixer, x):
    """Output of one sequence x `[tokens, hidden]`."""
    s = mixer.spec
    outputs, keys, values = [], [], []
    for position, row in enumerate(x):
        q, k, v, gate = (mixer.in_proj.weight @ row).split(s.in_proj_sizes)
        if s.qk_norm == "whole":
            q, k = rms(q, mixer.q_norm.weight, s.norm_eps), rms(k, mixer.k_norm.weight, s.norm_eps)
        q, k = list(q.view(s.num_heads, -1)), list(k.view(s.num_kv_heads, -1))
        if s.qk_norm == "head":
            q = [rms(h, mixer.q_norm.weight, s.norm_eps) for h in q]
            k = [rms(h, mixer.k_norm.weight, s.norm_eps) for h in k]
        if s.rope is not None:
            q, k = ([turned(h, position, s.rope.dims, s.rope.theta) for h in heads] for heads in (q, k))
        keys.append(k)
        values.append(v.view(s.num_kv_heads, -1))
        heads = []
        for h in range(s.num_heads):
            of = h // (s.num_heads // s.num_kv_heads)
            scores = torch.stack([q[h] @ key[of] for key in keys]) / math.sqrt(s.head_dim)
            chances = scores.exp() / scores.exp().sum()
            heads.append(sum(c * value[of] for c, value in zip(chances, values, strict=True)))
        o = torch.cat(heads)
        outputs.append(mixer.o_proj.weight @ (o / (1 + (-gate).exp()) if s.gated else o))
    return torch.stack(outputs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_attention_is_its_definition_alone_packed_in_pieces_and_token_by_token(spec):
    mixer = randomised(AttentionMixer(spec, 20, 0))
    lengths = (5, 1, 9)
    x = torch.randn(sum(lengths), 20, dtype=FLOAT64, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([attention_by_definition(mixer, part) for part in x.split(lengths)])
    packed, state = mixer(x, [0, *itertools.accumulate(lengths)])
    torch.testing.assert_close(packed, expected, **EXACT)
    assert [len(keys) for keys in state.keys] == [*lengths]

    table = Pages(5, 9, 128, "cpu")
    rows = PagedKV.zeros(spec, table, StateTypes(inputs=FLOAT64), "cpu")
    for slot in (1, 2, 0):
        assert table.grow(slot, 9)
    slots = torch.tensor([2, 0])
    first, last = x.split(lengths)[0], x.split(lengths)[2]
    pieces = mixer.prefill(torch.cat([first[:2], last[:7]]), [0, 2, 9], rows, slots)
    torch.testing.assert_close(pieces, torch.cat([expected[:2], expected[6:13]]), **EXACT)
    table.advance(slots, [0, 2, 9])
    step = mixer.decode(torch.stack([first[2], last[7]]), rows, slots)
    torch.testing.assert_close(step, torch.stack([expected[2], expected[13]]), **EXACT)
    table.advance(slots)
    table.share(2, 3, 3)
    rows.copy(2, 3)
    table.copy_length(2, 3)
    step = mixer.decode(first[3:4], rows, torch.tensor([3]))
    torch.testing.assert_close(step, expected[3:4], **EXACT)
    table.advance(torch.tensor([3]))
    assert table.lengths.tolist() == [8, 0, 3, 4, 0]
    assert [t.shape for t in rows.tensors(3, 4).values()] == [(4, spec.num_kv_heads, spec.head_dim)] * 2
    torch.testing.assert_close(
        rows.tensors(3, 4), {"keys": state.keys[0][:4], "values": state.values[0][:4]}, **EXACT
    )


def test_rotation_leaves_the_other_channels_alone():
    x = torch.randn(3, 2, 10, dtype=FLOAT64)
    (turned_x,) = rotate(RopeSpec(4, 50.0), torch.tensor([0, 1, 7]), x)
    assert torch.equal(turned_x[..., 4:], x[..., 4:]) and torch.equal(turned_x[0], x[0])
    assert not torch.allclose(turned_x[1:, :, :4], x[1:, :, :4])


def moe_by_definition(moe, row):
    def expert(gate_up, down):
        gate, up = (gate_up @ row).chunk(2)
        return down @ (gate / (1 + (-gate).exp()) * up)

    scores = (moe.router.weight @ row).exp()
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[: moe.spec.top_k]
    total = sum(scores[e] for e in chosen)
    y = sum(scores[e] / total * expert(moe.in_proj[e], moe.out_proj[e]) for e in chosen)
    shared = expert(moe.shared.in_proj.weight, moe.shared.out_proj.weight)
    return y + shared / (1 + (-(moe.shared_gate.weight[0] @ row)).exp())


def test_experts_are_their_definition():
    moe = randomised(MoE(MOE, 12))
    x = torch.randn(17, 12, dtype=FLOAT64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(moe(x), torch.stack([moe_by_definition(moe, row) for row in x]), **EXACT)


def test_norms_behind_are_of_what_comes_out():
    block = randomised(Block(LayerSpec(SPECS["olmo"], MLPSpec(9), NormSpec(1e-5), norm_after=True), 20, 0))
    x = torch.randn(4, 20, dtype=FLOAT64)
    inner = attention_by_definition(block.mixer, x)
    x_mid = x + torch.stack([rms(row, block.mixer_norm.weight, 1e-5) for row in inner])
    expected = x_mid + torch.stack([rms(block.ffn(row), block.ffn_norm.weight, 1e-5) for row in x_mid])
    torch.testing.assert_close(block(x, [0, 4])[0], expected, **EXACT)


def model_of(*layers):
    spec = ModelSpec("test", 37, 24, layers, NormSpec(1e-6), False, 64, ())
    return randomised(Model(spec))


def hybrid():
    delta, norm = mixer_spec(num_k_heads=2, num_v_heads=4, d_k=10, d_v=24), NormSpec(1e-6)
    return model_of(
        LayerSpec(delta, MLPSpec(40), norm),
        LayerSpec(SPECS["qwen"], MOE, norm),
        LayerSpec(delta, MOE, norm),
        LayerSpec(SPECS["olmo"], MLPSpec(40), norm, norm_after=True),
    )


@pytest.mark.parametrize("runtime", [TorchRuntime, CpuRuntime])
def test_a_hybrid_is_served_as_its_forward_says(runtime):
    model = hybrid()
    ids = torch.randint(37, (150,), generator=torch.Generator().manual_seed(3))
    expected, _ = model(ids, [0, 80, 150])
    served = runtime(model.float())
    pool, slots = StatePool.with_room(model.spec, 3, 128), torch.tensor([2, 0])
    hidden = served.prefill(torch.cat([ids[:64], ids[80:140]]), [0, 64, 124], pool, slots)
    steps = [served.decode(torch.stack([ids[64 + t], ids[140 + t]]), pool, slots) for t in range(10)]
    found = torch.cat([hidden, *steps]).double()
    rows = [*range(64), *range(80, 140), *(n for t in range(10) for n in (64 + t, 140 + t))]
    # float32 against float64, over four layers
    torch.testing.assert_close(found, expected[rows], rtol=1e-3, atol=1e-4)


def test_what_grows_with_tokens_is_counted():
    spec = hybrid().spec
    bf16 = StateTypes(inputs=torch.bfloat16)
    assert spec.kv_bytes_per_token(bf16) == 2 * 2 * (2 * 16 + 4 * 8)
    assert spec.state_bytes(10, bf16) - spec.state_bytes(0, bf16) == 10 * spec.kv_bytes_per_token(bf16)
    assert spec.linear_layers == (0, 2) and spec.with_d_k((4, 4)).layers[1] == spec.layers[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionSpec(3, 2, 8, None, "none", False, 1e-6), "num_heads=3 must be a multiple of num_kv_heads=2"),
        (lambda: AttentionSpec(0, 1, 8, None, "none", False, 1e-6), "num_heads must be at least 1, got 0"),
        (lambda: AttentionSpec(2, 2, 8, RopeSpec(10, 1e4), "none", False, 1e-6), "rotary dims 10 are more than"),
        (lambda: RopeSpec(3, 1e4), "even number of at least 2, got 3"),
        (lambda: MoESpec(4, 5, 8, 8), "top_k=5 must be between 1 and num_experts=4"),
    ],
)  # fmt: skip
def test_shapes_that_can_not_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_long_sequences_take_a_kernel_that_holds_no_scores():
    q, keys, values = (torch.randn(300, heads, 16) for heads in (4, 2, 2))
    # Refuses what only the kernel that builds all scores could take.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        fused = attend(q, keys, values)
    scores = torch.einsum("qhd,khd->hqk", q, keys.repeat_interleave(2, 1)) / 4
    scores.masked_fill_(torch.ones(300, 300, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(2, 1))
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)
