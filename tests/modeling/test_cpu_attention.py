"""Compiled softmax attention on pages against its definition in float64, which shares no code with it."""

import math

import pytest
import torch

from modeling.model import Model
from modeling.runtime.cpu import CpuRuntime
from modeling.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RopeSpec,
    StateTypes,
)
from modeling.state import StatePool

FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64
HIDDEN, VOCABULARY, EPS = 24, 40, 1e-6
LENGTHS = (0, 1, 63, 64, 65, 200, 1000)
# Key/value heads, query heads of each, width: every group and width that the kernels cut otherwise.
SPECS = {
    "1x1x64": AttentionSpec(1, 1, 64, None, "none", False, 1e-6),
    "2x2x16": AttentionSpec(4, 2, 16, RopeSpec(8, 1e4), "head", True, 1e-6),
    "1x3x24": AttentionSpec(3, 1, 24, RopeSpec(24, 100.0), "whole", False, 1e-5),
    "2x4x256": AttentionSpec(8, 2, 256, RopeSpec(64, 1e7), "head", True, 1e-6),
    "1x8x80": AttentionSpec(8, 1, 80, RopeSpec(20, 1e4), "none", True, 1e-6),
    "1x16x128": AttentionSpec(16, 1, 128, RopeSpec(32, 1e6), "head", True, 1e-6),
    "3x1x80": AttentionSpec(3, 3, 80, None, "whole", False, 1e-6),
    "1x70x8": AttentionSpec(70, 1, 8, RopeSpec(2, 1e4), "head", False, 1e-6),
    "2x5x13": AttentionSpec(10, 2, 13, RopeSpec(6, 1e4), "head", True, 1e-6),
}


def model_of(spec, weights=FLOAT32, seed=0):
    """One layer whose feed-forward adds nothing. Scores spread over several units, so that an average over all keys,
    or over the wrong ones, is far off."""
    layer = LayerSpec(spec, MLPSpec(8), NormSpec(EPS))
    model = Model(ModelSpec("test", VOCABULARY, HIDDEN, (layer,), NormSpec(EPS), False, 4096, ()))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else p.shape[-1] ** -0.5)
        if "norm" in name:
            p.data += 2 if "q_norm" in name or "k_norm" in name else 1
    if spec.qk_norm == "none":
        model.layers[0].mixer.in_proj.weight.data[: spec.q_dim] *= 3
    model.layers[0].ffn.out_proj.weight.data.zero_()
    return model.requires_grad_(False).to(weights)


def pool_of(model, lengths, types, seed=1):
    """A pool whose i-th slot has so many tokens of random keys and values, in pages in random order, of which the last
    two slots share all that are full in both; and those keys and values `[tokens, kv heads, width]` by slot."""
    generator = torch.Generator().manual_seed(seed)
    pool = StatePool.with_room(model.spec, len(lengths), 1216, types=types)
    order = torch.randperm(pool.pages.count, generator=generator).int()
    pool.pages.blocks[:-1] = order.view(len(lengths), -1)
    shared = min(lengths[-2:]) // 64
    pool.pages.blocks[len(lengths) - 1, :shared] = pool.pages.blocks[len(lengths) - 2, :shared]
    held = []
    state = pool.layers[0]
    for t in (state.keys, state.values):
        t[:-1] = torch.randn(t[:-1].shape, generator=generator)
    for slot, length in enumerate(lengths):
        pool.pages.set_length(slot, length)
        held.append([stored(t, pool, slot, length) for t in (state.keys, state.values)])
    return pool, held


def stored(t, pool, slot, length):
    """What stands at the places of a slot's tokens, read one by one."""
    rows = [t[pool.pages.blocks[slot, p // 64], :, p % 64] for p in range(length)]
    return torch.stack(rows).double() if rows else torch.zeros(0, t.shape[1], t.shape[3], dtype=FLOAT64)


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, position, rope):
    """x `[..., width]` of one token, its pairs of channels as complex numbers."""
    half = rope.dims // 2
    angles = torch.tensor([position / rope.theta ** (c / half) for c in range(half)], dtype=FLOAT64)
    z = torch.complex(x[..., :half], x[..., half : rope.dims]) * torch.polar(
        torch.ones(half, dtype=FLOAT64), angles
    )
    return torch.cat([z.real, z.imag, x[..., rope.dims :]], -1)


def by_definition(model, ids, keys, values, kept, rounds=lambda x: x):
    """Hidden states of tokens that follow keys and values `[tokens, kv heads, width]`, and all keys and values then.
    `kept` is the dtype that those are kept in; `rounds` is what products do to their inputs."""
    model = model.double()
    s, mixer, out = model.spec.layers[0].mixer, model.layers[0].mixer, []
    for token in ids.tolist():
        x = model.embeddings.weight[token]
        inner = rounds(rms(x, model.layers[0].mixer_norm.weight, EPS))
        q, k, v, gate = (mixer.in_proj.weight @ inner).split(s.in_proj_sizes)
        if s.qk_norm == "whole":
            q, k = rms(q, mixer.q_norm.weight, s.norm_eps), rms(k, mixer.k_norm.weight, s.norm_eps)
        q, k, v = q.view(-1, s.head_dim), k.view(-1, s.head_dim), v.view(-1, s.head_dim)
        if s.qk_norm == "head":
            q, k = rms(q, mixer.q_norm.weight, s.norm_eps), rms(k, mixer.k_norm.weight, s.norm_eps)
        if s.rope is not None:
            q, k = turned(q, len(keys), s.rope), turned(k, len(keys), s.rope)
        keys, values = (
            torch.cat([old, new[None].to(kept).double()]) for old, new in ((keys, k), (values, v))
        )
        heads = []
        for h in range(s.num_heads):
            of = h // (s.num_heads // s.num_kv_heads)
            scores = (keys[:, of] * q[h]).sum(-1) / math.sqrt(s.head_dim)
            weights = (scores - scores.max()).exp()
            heads.append((weights[:, None] * values[:, of]).sum(0) / weights.sum())
        o = torch.cat(heads)
        x = x + mixer.o_proj.weight @ rounds(o / (1 + (-gate).exp()) if s.gated else o)
        out.append(rms(x, model.norm.weight, EPS))
    return torch.stack(out), keys, values


def bf16(x):
    return x.to(BFLOAT16).double()


def difference(a, b):
    assert a.shape == b.shape and bool(a.isfinite().all())
    return float((a.double() - b).abs().max() / b.abs().max())


def tolerance(*dtypes):
    # With bfloat16, queries are rounded for their products with keys, and so is what is returned.
    return 2e-2 if BFLOAT16 in dtypes else 2e-5


@pytest.mark.parametrize("kept", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_steps_at_any_length_are_the_definition(name, kept):
    model = model_of(SPECS[name])
    runtime, (pool, held) = CpuRuntime(model), pool_of(model, LENGTHS, StateTypes(inputs=kept))
    slots = torch.tensor([6, 2, 0, pool.null_slot, 5, 1, pool.null_slot, 3, 4])
    before = [t.clone() for t in (pool.layers[0].keys, pool.layers[0].values)]
    written = torch.zeros(before[0].shape[0], 64, dtype=torch.bool)
    written[pool.pages.null_page] = True
    for step in range(2):
        ids = (torch.arange(len(slots)) * 7 + step * 5) % VOCABULARY
        for slot, length in enumerate(pool.pages.lengths[:-1].tolist()):
            written[pool.pages.blocks[slot, length // 64], length % 64] = True
        hidden = runtime.decode(ids, pool, slots)
        assert bool(hidden.isfinite().all())
        for row, slot in enumerate(slots.tolist()):
            if slot == pool.null_slot:
                continue
            expected, *held[slot] = by_definition(
                model_of(SPECS[name]), ids[row : row + 1], *held[slot], kept
            )
            assert difference(hidden[row : row + 1], expected) < tolerance(kept)
    assert pool.pages.lengths.tolist() == [n + 2 for n in LENGTHS] + [0]
    for t, old, part in zip((pool.layers[0].keys, pool.layers[0].values), before, (0, 1), strict=True):
        assert torch.equal(t.transpose(1, 2)[~written], old.transpose(1, 2)[~written])
        for slot, length in enumerate(LENGTHS):
            new = stored(t, pool, slot, length + 2)[length:]
            assert difference(new, held[slot][part][length:]) < (1e-2 if kept == BFLOAT16 else 1e-5)


@pytest.mark.parametrize("kept", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_prompts_that_go_on_at_any_length_are_the_definition(name, kept):
    model = model_of(SPECS[name])
    runtime, (pool, held) = CpuRuntime(model), pool_of(model, LENGTHS, StateTypes(inputs=kept))
    new = (130, 1, 5, 64, 65, 150, 2)
    slots = torch.tensor([3, 6, 0, 4, 2, 1, 5])
    ids, offsets = (torch.arange(sum(new)) * 11) % VOCABULARY, [sum(new[:i]) for i in range(8)]
    hidden = runtime.prefill(ids, offsets, pool, slots)
    for slot, h, part in zip(slots.tolist(), hidden.split(new), ids.split(new), strict=True):
        expected, *held[slot] = by_definition(model_of(SPECS[name]), part, *held[slot], kept)
        assert difference(h, expected) < tolerance(kept)
        for t, reference in zip((pool.layers[0].keys, pool.layers[0].values), held[slot], strict=True):
            found = stored(t, pool, slot, len(reference))
            assert difference(found, reference) < (1e-2 if kept == BFLOAT16 else 1e-5)
    lengths = dict(zip(slots.tolist(), new, strict=True))
    assert pool.pages.lengths.tolist() == [n + lengths[i] for i, n in enumerate(LENGTHS)] + [0]


@pytest.mark.parametrize("kept", [FLOAT32, BFLOAT16], ids=str)
def test_weights_in_bfloat16_take_keys_and_values_in_either(kept):
    model = model_of(SPECS["2x4x256"], BFLOAT16)
    runtime, (pool, held) = CpuRuntime(model), pool_of(model, (65, 200), StateTypes(inputs=kept))
    ids = torch.arange(10)
    hidden = runtime.prefill(ids[:8], [0, 3, 8], pool, torch.tensor([1, 0]))
    hidden = torch.cat([hidden, runtime.decode(ids[8:], pool, torch.tensor([1, 0]))])
    for slot, rows in ((1, [0, 1, 2, 8]), (0, [3, 4, 5, 6, 7, 9])):
        exact = model_of(SPECS["2x4x256"], BFLOAT16)
        expected, *_ = by_definition(exact, ids[rows], *held[slot], kept, bf16)
        assert difference(hidden[rows], expected) < 2e-2


@pytest.mark.parametrize("kept", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_a_requests_bits_depend_on_nothing_else(name, kept):
    """Products are of as many rows each time; what the other rows are, attention must not care."""
    model = model_of(SPECS[name])
    runtime, results = CpuRuntime(model), []
    threads = torch.get_num_threads()
    try:
        for at, others, n in ((0, [0, 1, 2, 3, 4, 6, 6], 1), (2, [6] * 7, 2), (7, [6, 4, 3, 2, 1, 6, 0], 5)):
            torch.set_num_threads(n)
            pool, _ = pool_of(model, LENGTHS, StateTypes(inputs=kept))
            others = [slot if slot < 6 else pool.null_slot for slot in others]
            slots, ids = torch.tensor([*others[:at], 5, *others[at:]]), torch.arange(8) + 20
            ids[at] = 7
            results.append(runtime.decode(ids, pool, slots)[at])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kept", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("width", [13, 24, 80])
def test_a_prompt_cut_elsewhere_is_the_same_bits(width, kept):
    """Products are of whole tiles each time. With three heads the last rows that share a page's values are other
    tokens' in each cut, and fewer rows are computed together there."""
    model = model_of(AttentionSpec(3, 1, width, None, "none", False, 1e-6))
    runtime, ids, results = CpuRuntime(model), (torch.arange(128) * 11) % VOCABULARY, []
    for lengths in ((128,), (64, 64), (32, 96)):
        pool, _ = pool_of(model, (1, 200), StateTypes(inputs=kept))
        pieces = ids.split(lengths)
        slot = torch.tensor([1])
        results.append(torch.cat([runtime.prefill(x, [0, len(x)], pool, slot) for x in pieces]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_positions_far_out_are_turned_as_exactly_as_near_ones():
    """Position 262,143: an angle in float32 would be off by a hundredth."""
    spec, length = AttentionSpec(2, 1, 16, RopeSpec(16, 1e7), "head", False, 1e-6), 64 * 4096 - 1
    model = model_of(spec)
    pool = StatePool(model.spec, 1, pages=4096, max_tokens=length + 1)
    pool.pages.blocks[0] = torch.arange(4096) % 7
    pool.pages.blocks[0, -1] = 8
    for t in (pool.layers[0].keys, pool.layers[0].values):
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(0)))
    pool.pages.set_length(0, length)
    pages = pool.pages.blocks[0].long()
    held = [
        t[pages].transpose(1, 2).flatten(0, 1)[:length].double()
        for t in (pool.layers[0].keys, pool.layers[0].values)
    ]
    ids = torch.tensor([3])
    hidden = CpuRuntime(model).decode(ids, pool, torch.tensor([0]))
    expected, keys, _ = by_definition(model_of(spec), ids, *held, FLOAT32)
    assert difference(hidden, expected) < 2e-5
    assert difference(pool.layers[0].keys[8, :, 63], keys[-1]) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_value_stays_in_its_request_and_shows(bad):
    model = model_of(SPECS["2x4x256"])
    runtime, slots = CpuRuntime(model), torch.tensor([0, 5, 2])
    for part in ("keys", "values"):
        pool, _ = pool_of(model, LENGTHS, StateTypes())
        broken, _ = pool_of(model, LENGTHS, StateTypes())
        getattr(broken.layers[0], part)[broken.pages.blocks[5, 1], :, 3] = bad
        expected, hidden = (runtime.decode(torch.tensor([1, 2, 3]), p, slots) for p in (pool, broken))
        assert torch.equal(hidden[[0, 2]], expected[[0, 2]]) and not hidden[1].isfinite().any()
        offsets, ids = [0, 3, 70, 75], torch.arange(75) % VOCABULARY
        expected, hidden = (runtime.prefill(ids, offsets, p, slots) for p in (pool, broken))
        rows = [*range(3), *range(70, 75)]
        assert torch.equal(hidden[rows], expected[rows]) and not hidden[3:70].isfinite().any()


def test_what_stands_behind_a_requests_tokens_is_never_used():
    """Pages hold what their last owner left, which may be anything."""
    model = model_of(SPECS["2x4x256"])
    runtime, slots = CpuRuntime(model), torch.tensor([0, 1, 2])
    clean, _ = pool_of(model, (5, 64, 200), StateTypes())
    dirty, _ = pool_of(model, (5, 64, 200), StateTypes())
    used = torch.zeros(dirty.pages.count + 1, 64, dtype=torch.bool)
    for slot, length in enumerate((5, 64, 200)):
        for p in range(length):
            used[dirty.pages.blocks[slot, p // 64], p % 64] = True
    for t in (dirty.layers[0].keys, dirty.layers[0].values):
        t.transpose(1, 2)[~used] = torch.nan
    for step in (
        lambda pool: runtime.decode(torch.tensor([1, 2, 3]), pool, slots),
        lambda pool: runtime.prefill(torch.arange(30), [0, 4, 13, 30], pool, slots),
    ):
        assert torch.equal(step(clean), step(dirty))


def test_tokens_without_a_place_are_refused_before_anything_moves():
    model = model_of(SPECS["2x2x16"])
    runtime = CpuRuntime(model)
    pool, _ = pool_of(model, (5, 1216, 1210), StateTypes())
    before = [t.clone() for t in (pool.layers[0].keys, pool.layers[0].values, pool.pages.lengths)]
    two = torch.tensor([0, 1])
    for refused in (
        lambda: runtime.decode(two, pool, two),
        lambda: runtime.prefill(torch.arange(9), [0, 2, 9], pool, torch.tensor([0, 2])),
        lambda: runtime.prefill(torch.arange(3), [0, 1, 3], pool, two),
    ):
        with pytest.raises(IndexError, match="more tokens than fit the pages of a slot"):
            refused()
    for page in (-1, pool.pages.count + 1):
        kept = int(pool.pages.blocks[0, 0])
        pool.pages.blocks[0, 0] = page
        with pytest.raises(IndexError, match="names a page that is outside the pool"):
            runtime.decode(two[:1], pool, two[:1])
        with pytest.raises(IndexError, match="names a page that is outside the pool"):
            runtime.prefill(two, [0, 2], pool, two[:1])
        pool.pages.blocks[0, 0] = kept
    with pytest.raises(ValueError, match="int64"):
        runtime.prefill(two, [0, 1, 2], pool, two.int())
    after = (pool.layers[0].keys, pool.layers[0].values, pool.pages.lengths)
    assert all(map(torch.equal, after, before))
    runtime.prefill(torch.arange(6), [0, 6], pool, torch.tensor([2]))
    assert pool.pages.lengths.tolist() == [5, 1216, 1216, 0]


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float16])
def test_keys_and_values_that_it_would_misread_are_refused(dtype):
    model = model_of(SPECS["2x2x16"])
    pool = StatePool.with_room(model.spec, 1, 64, types=StateTypes(inputs=dtype))
    runtime, one = CpuRuntime(model), torch.tensor([0])
    for call in (
        lambda: runtime.decode(one, pool, one),
        lambda: runtime.prefill(one, [0, 1], pool, one),
    ):
        with pytest.raises(ValueError, match=f"must be float32 or bfloat16 on the CPU, got {dtype}"):
            call()


def test_padding_alone_runs():
    model = model_of(SPECS["2x2x16"])
    pool, _ = pool_of(model, (5, 6), StateTypes())
    null = torch.full((4,), pool.null_slot)
    for _ in range(3):
        assert bool(CpuRuntime(model).decode(torch.arange(4), pool, null).isfinite().all())
    assert bool(CpuRuntime(model).prefill(torch.arange(20), [0, 20], pool, null[:1]).isfinite().all())
    assert pool.pages.lengths.tolist() == [5, 6, 0]
