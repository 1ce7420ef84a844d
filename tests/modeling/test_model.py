"""Whole models against an oracle that shares no code with ours, and the forms of the forward against each other."""

import itertools

import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint
from oracle import fla_logits
from states import recurrent, tensors

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime
from modeling.state import StatePool

CONFIGS = {
    "gated": GATED,
    "gated-no-gate": {**GATED, "use_gate": False},
    "gated-sigmoid-tied": {**GATED, "output_gate_activation": "sigmoid", "tie_word_embeddings": True},
    "gated-neg-eigval-odd": {**GATED, "allow_neg_eigval": True, "head_dim": 20, "expand_v": 1.4},
    "gated-conv-bias": {**GATED, "conv_bias": True, "conv_size": 3, "num_v_heads": None},
    # A large eps shows factors on o, which the output norm otherwise cancels.
    "gated-large-eps": {**GATED, "norm_eps": 0.01},
    "delta": DELTA,
    "delta-gate": {**DELTA, "use_gate": True, "allow_neg_eigval": True, "tie_word_embeddings": False},
    "delta-no-beta-narrow": {**DELTA, "use_beta": False, "expand_k": 0.75},
}


@pytest.fixture(params=CONFIGS, scope="module")
def case(request, tmp_path_factory):
    config = CONFIGS[request.param]
    tensors = random_tensors(config)
    path = write_checkpoint(tmp_path_factory.mktemp("m") / "c", config, tensors)
    return config, tensors, open_checkpoint(path).load()


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def test_logits_match_the_oracle(case):
    config, tensors, model = case
    torch.manual_seed(0)
    lengths = [1, 70, 130]
    rows = [torch.randint(0, 257, (n,)) for n in lengths]
    hidden, _ = model(torch.cat(rows), [0, *itertools.accumulate(lengths)])
    for ours, ids in zip(model.logits(hidden).split(lengths), rows, strict=True):
        assert difference(ours, fla_logits(tensors, config, ids[None])[0]) < 1e-4


@torch.no_grad()
def test_prefill_in_any_chunking_then_decode_is_the_one_shot_forward(case):
    _, _, model = case
    torch.manual_seed(1)
    ids = torch.randint(0, 257, (150,))
    expected, final = model(ids, [0, len(ids)])
    for cuts in ([0, 1], [0, 64, 130], [0, 2, 3, 67, 140]):
        pool = StatePool(model.spec, 3)
        pool.allocate()
        slot = torch.tensor([pool.allocate()])
        hidden = []
        for start, end in itertools.pairwise(cuts):
            h, state = model(ids[start:end], [0, end - start], pool.gather(slot))
            pool.scatter(slot, state)
            hidden.append(h)
        for t in range(cuts[-1], len(ids)):
            hidden.append(TorchRuntime(model).decode(ids[t : t + 1], pool, slot))
        assert difference(torch.cat(hidden), expected) < 1e-4
        for ours, theirs in zip(tensors(pool), tensors(final), strict=True):
            assert difference(ours[slot], theirs) < 1e-4


@torch.no_grad()
def test_decode_of_a_batch_is_decode_of_each_and_touches_no_other_slot(case):
    _, _, model = case
    torch.manual_seed(2)
    pool, alone = StatePool(model.spec, 5), StatePool(model.spec, 5)
    for p in (pool, alone):
        torch.manual_seed(3)
        for t in tensors(p):
            t.copy_(torch.randn_like(t) * 0.1)
    ids, slots = torch.tensor([5, 6, 7]), torch.tensor([4, 0, 2])
    untouched = [t[[1, 3]].clone() for t in recurrent(pool)]
    together = TorchRuntime(model).decode(ids, pool, slots)
    each = torch.cat([TorchRuntime(model).decode(ids[i : i + 1], alone, slots[i : i + 1]) for i in range(3)])
    assert difference(together, each) < 1e-5
    assert all(torch.equal(a, t[[1, 3]]) for a, t in zip(untouched, recurrent(pool), strict=True))


def test_forward_is_differentiable_to_every_parameter(case):
    _, _, model = case
    model.requires_grad_(True)
    try:
        hidden, _ = model(torch.arange(1, 80), [0, 70, 79])
        model.logits(hidden).square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    finally:
        model.zero_grad()
        model.requires_grad_(False)


@torch.no_grad()
def test_layers_may_differ_in_d_k(tmp_path):
    config = {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]}
    model = open_checkpoint(write_checkpoint(tmp_path / "c", config)).load()
    assert model.spec.d_k == (32, 8, 20)
    pool = StatePool(model.spec, 2)
    assert pool.bytes_per_slot == model.spec.state_bytes(0)
    ids = torch.randint(0, 257, (40,))
    expected, _ = model(ids, [0, 40])
    hidden = [TorchRuntime(model).decode(ids[t : t + 1], pool, torch.tensor([1])) for t in range(40)]
    assert difference(torch.cat(hidden), expected) < 1e-4


@torch.no_grad()
def test_tap_sees_and_replaces_q_and_k(case):
    _, _, model = case
    seen = []

    def tap(layer, x, q, k):
        seen.append((layer, x.shape, q.shape, k.shape))
        return q, k

    ids = torch.arange(10)
    plain, _ = model(ids, [0, 10])
    tapped, _ = model(ids, [0, 10], tap=tap)
    m = model.spec.layers[0].mixer
    heads = (10, m.num_k_heads, m.d_k)
    assert seen == [(i, (10, 64), heads, heads) for i in range(3)]
    assert torch.equal(plain, tapped)
    zeroed, _ = model(ids, [0, 10], tap=lambda layer, x, q, k: (q * 0, k))
    assert not torch.allclose(plain, zeroed)
