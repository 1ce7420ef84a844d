"""Compiled experts against their definition in float64, which shares no code with them."""

import pytest
import torch
from specs import mixer_spec

from modeling.model import Model
from modeling.runtime import compile_model
from modeling.runtime.cpu import CpuRuntime
from modeling.spec import LayerSpec, ModelSpec, MoESpec, NormSpec
from modeling.state import StatePool

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
HIDDEN, VOCABULARY, EPS = 21, 310, 1e-6
SPECS = {
    "all-of-4": MoESpec(num_experts=4, top_k=4, expert_size=6, shared_size=5),
    "1-of-5": MoESpec(num_experts=5, top_k=1, expert_size=17, shared_size=9),
    "2-of-8": MoESpec(num_experts=8, top_k=2, expert_size=40, shared_size=24),
    "8-of-64": MoESpec(num_experts=64, top_k=8, expert_size=12, shared_size=16),
    "3-of-7": MoESpec(num_experts=7, top_k=3, expert_size=100, shared_size=33),
}


def model_of(spec, weights=FLOAT32, seed=0):
    """One layer whose mixer adds nothing."""
    layer = LayerSpec(mixer_spec(), spec, NormSpec(EPS))
    model = Model(ModelSpec("test", VOCABULARY, HIDDEN, (layer,), NormSpec(EPS), False, 64, ()))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else p.shape[-1] ** -0.5)
        if "norm" in name:
            p.data += 1
    model.layers[0].mixer.o_proj.weight.data.zero_()
    return model.requires_grad_(False).to(weights)


def rms(x, weight):
    return x / (x.square().mean() + EPS).sqrt() * weight


def by_definition(model, ids, rounds):
    """Hidden states, token by token; `rounds` is what products do to their inputs."""
    model = model.double()
    moe, out = model.layers[0].ffn, []

    def expert(row, gate_up, down):
        gate, up = (gate_up @ row).chunk(2)
        return down @ rounds(gate / (1 + (-gate).exp()) * up)

    for token in ids.tolist():
        x = model.embeddings.weight[token]
        row = rounds(rms(x, model.layers[0].ffn_norm.weight))
        chances = (moe.router.weight @ row).exp()
        chances = chances / chances.sum()
        chosen = sorted(range(len(chances)), key=lambda e: (-float(chances[e]), e))[: moe.spec.top_k]
        total = sum(chances[e] for e in chosen)
        y = sum(chances[e] / total * expert(row, moe.in_proj[e], moe.out_proj[e]) for e in chosen)
        shared = expert(row, moe.shared.in_proj.weight, moe.shared.out_proj.weight)
        y = y + shared / (1 + (-(moe.shared_gate.weight[0] @ row)).exp())
        out.append(rms(x + y, model.norm.weight))
    return torch.stack(out)


def bf16(x):
    return x.to(BFLOAT16).double()


def exact(model, ids, weights):
    return by_definition(model, ids, bf16 if weights == BFLOAT16 else lambda x: x)


def difference(a, b):
    assert a.shape == b.shape and bool(a.isfinite().all())
    return float((a.double() - b).abs().max() / b.abs().max())


def both(runtime, ids):
    """The hidden states of tokens as one step, and as one prompt."""
    n = len(ids)
    pool = StatePool(runtime.model.spec, n)
    slots = torch.arange(n)
    return runtime.decode(ids, pool, slots), runtime.prefill(ids, [0, n], pool, slots[:1])


@pytest.mark.parametrize("weights", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("name", SPECS)
def test_experts_of_any_number_of_tokens_are_the_definition(name, tokens, weights):
    runtime = CpuRuntime(model_of(SPECS[name], weights))
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[:tokens]
    expected = exact(model_of(SPECS[name], weights), ids, weights)
    for hidden in both(runtime, ids):
        assert hidden.dtype == weights
        # In bfloat16 that is the rounding of what is returned.
        assert difference(hidden, expected) < (1e-2 if weights == BFLOAT16 else 1e-5)


@pytest.mark.parametrize("tokens", [3, 150])
def test_experts_that_all_tokens_take_and_that_none_takes(tokens):
    model, reference = model_of(SPECS["8-of-64"]), model_of(SPECS["8-of-64"])
    direction = torch.ones(HIDDEN)
    for m in (model, reference):
        m.embeddings.weight.data.mul_(0.1).add_(direction)
        m.layers[0].ffn.router.weight.data[::8] += 3 * direction
        m.layers[0].ffn.router.weight.data[1::2] -= 3 * direction
    ids = torch.arange(tokens)
    expected = exact(reference, ids, FLOAT32)
    for hidden in both(CpuRuntime(model), ids):
        assert difference(hidden, expected) < 1e-5


def test_of_equal_experts_the_first_are_taken():
    model, reference = model_of(SPECS["3-of-7"]), model_of(SPECS["3-of-7"])
    for m in (model, reference):
        m.layers[0].ffn.router.weight.data.zero_()
    ids = torch.arange(20)
    for hidden in both(CpuRuntime(model), ids):
        assert difference(hidden, exact(reference, ids, FLOAT32)) < 1e-5


def test_a_router_that_is_certain_does_not_overflow():
    model, reference = model_of(SPECS["2-of-8"]), model_of(SPECS["2-of-8"])
    for m in (model, reference):
        m.layers[0].ffn.router.weight.data *= 60
    ids = torch.arange(50)
    for hidden in both(CpuRuntime(model), ids):
        assert difference(hidden, exact(reference, ids, FLOAT32)) < 1e-4


def test_several_threads_give_the_bits_of_one():
    runtime, ids = CpuRuntime(model_of(SPECS["8-of-64"])), torch.arange(45)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(both(runtime, ids))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_token_that_is_nan_stays_alone_and_shows():
    model = model_of(SPECS["8-of-64"])
    model.embeddings.weight.data[7] = torch.nan
    ids, others = torch.arange(20), [*range(7), *range(8, 20)]
    expected = exact(model_of(SPECS["8-of-64"]), ids[others], FLOAT32)
    runtime, slots = CpuRuntime(model), torch.arange(20)
    for run in (
        lambda pool: runtime.decode(ids, pool, slots),
        lambda pool: runtime.prefill(ids, range(21), pool, slots),
    ):
        hidden = run(StatePool(model.spec, 20))
        assert not hidden[7].isfinite().any()
        assert difference(hidden[others], expected) < 1e-5


def test_experts_that_it_does_not_take_go_to_torch_and_the_log_says_so(caplog):
    narrow = model_of(MoESpec(num_experts=4, top_k=2, expert_size=3, shared_size=8))
    assert compile_model(narrow).name == "torch" and "a matrix of 6 rows" in caplog.text
    mixed = model_of(SPECS["2-of-8"])
    mixed.layers[0].ffn.in_proj.data = mixed.layers[0].ffn.in_proj.bfloat16()
    caplog.clear()
    assert compile_model(mixed).name == "torch" and "a torch.bfloat16 matrix" in caplog.text
