"""Models whose layers are of several kinds: one of ours, and one that only these tests know."""

import itertools

import pytest
import torch
from second_kind import AverageSpec, registered
from specs import mixer_spec
from states import tensors

from modeling.model import Model
from modeling.runtime import TorchRuntime, UnavailableError
from modeling.runtime.cpu import CpuRuntime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.spec import LayerSpec, MLPSpec, ModelSpec, NormSpec, StateTypes
from modeling.state import StatePool

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DELTA, AVERAGE = mixer_spec(num_k_heads=2, num_v_heads=4, d_k=10, d_v=24), AverageSpec(12)


def spec_of(*mixers):
    layers = tuple(LayerSpec(mixer, MLPSpec(40), NormSpec(1e-6)) for mixer in mixers)
    return ModelSpec("test", 37, 24, layers, NormSpec(1e-6), False, 64, ())


def model_of(spec):
    torch.manual_seed(0)
    model = Model(spec).requires_grad_(False)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
        if "norm" in name:
            p += 1
    return model


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


@pytest.fixture
def spec():
    return spec_of(DELTA, AVERAGE, DELTA, AVERAGE)


def slot_tensors(pool, slot):
    return list(pool.tensors(slot, 0).values())


def test_a_spec_speaks_of_linear_layers_where_it_means_them(spec):
    assert spec.linear_layers == (0, 2) and spec.deltas == {0: DELTA, 2: DELTA}
    assert spec.d_k == (10, 10) and spec.mean_d_k == 10
    narrower = spec.with_d_k((10, 4))
    assert narrower.d_k == (10, 4) and narrower.layers[1] == spec.layers[1]
    assert [narrower.layers[i] == spec.layers[i] for i in range(4)] == [True, True, False, True]
    with pytest.raises(ValueError, match="4 entries for 2 linear layers"):
        spec.with_d_k((4,) * 4)


@pytest.mark.parametrize("types", [StateTypes(), StateTypes(BFLOAT16), StateTypes(inputs=BFLOAT16)], ids=str)
def test_a_pool_holds_what_the_spec_counts(spec, types):
    pool = StatePool(spec, 3, types=types)
    assert pool.bytes_per_slot == spec.state_bytes(5, types) == sum(t.nbytes for t in slot_tensors(pool, 1))
    assert list(pool.tensors(0, 0)) == [
        *("layers.0.recurrent", "layers.0.conv", "layers.1.average"),
        *("layers.2.recurrent", "layers.2.conv", "layers.3.average"),
    ]


def test_a_slot_is_zeroed_copied_gathered_and_scattered_whole(spec):
    pool = StatePool(spec, 3)
    for slot in range(4):
        for t in slot_tensors(pool, slot):
            t.fill_(slot + 1)
    pool.copy(1, 2)
    taken = [pool.allocate() for _ in range(1)]
    assert taken == [0]
    values = [{float(x) for t in slot_tensors(pool, slot) for x in t.flatten()} for slot in range(4)]
    assert values == [{0.0}, {2.0}, {2.0}, {4.0}]
    pool.scatter(torch.tensor([3, 0]), pool.gather(torch.tensor([1, 3])))
    values = [{float(x) for t in slot_tensors(pool, slot) for x in t.flatten()} for slot in range(4)]
    assert values == [{4.0}, {2.0}, {2.0}, {2.0}]


def difference(a, b):
    """Relative, in the Euclidean norm: single bfloat16 roundings of small numbers mean nothing."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("weights", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", [TorchRuntime, CpuRuntime])
@torch.inference_mode()
def test_prompts_in_pieces_and_decode_steps_are_the_forward_in_float64(spec, kind, weights):
    model = model_of(spec).to(weights)
    expected, final = model_of(spec).to(weights).double()(ids := torch.randint(0, 37, (150,)), [0, 90, 150])
    runtime = kind(model)
    pool = StatePool(spec, 4, types=StateTypes(inputs=weights))
    slots = torch.tensor([3, 1])
    hidden = [[], []]
    for a, b in ((0, 20), (20, 50)):
        pieces = [ids[a:b], ids[90 + a : 90 + b]]
        both = runtime.prefill(torch.cat(pieces), [0, b - a, 2 * (b - a)], pool, slots)
        for one, h in zip(hidden, both.split(b - a), strict=True):
            one.append(h)
    for t in range(50, 60):
        for one, h in zip(hidden, runtime.decode(ids[[t, 90 + t]], pool, slots).split(1), strict=True):
            one.append(h)
    for t in range(60, 90):
        hidden[0].append(runtime.decode(ids[t : t + 1], pool, slots[:1]))
    tolerance = 1e-5 if weights == FLOAT32 else 3e-2
    assert difference(torch.cat([*hidden[0], *hidden[1]]), expected) < tolerance
    for i, layer in enumerate(final):
        ours = [pool.layers[i].tensors(slot, 0) for slot in slots.tolist()]
        theirs = [layer.tensors(row, 0) for row in (0, 1)]
        assert ours[0].keys() == theirs[0].keys()
        for name in ours[0]:
            assert difference(*(torch.stack([t[name] for t in side]) for side in (ours, theirs))) < tolerance
    assert not any(t.any() for slot in (0, 2, 4) for t in slot_tensors(pool, slot))
    assert (
        difference(runtime.logits(hidden[0][-1]), hidden[0][-1].double() @ model.lm_head.weight.double().T)
        < 1e-2
    )


@torch.inference_mode()
def test_layer_by_layer_the_compiled_states_are_the_bits_of_the_whole_model(monkeypatch):
    spec = spec_of(DELTA, DELTA, DELTA)
    model, ids = model_of(spec), torch.randint(0, 37, (200,))
    pools = []
    for whole in (True, False):
        runtime, pool = CpuRuntime(model), StatePool(spec, 2)
        monkeypatch.setattr(runtime, "_whole", whole)
        runtime.prefill(ids, [0, 130, 200], pool, torch.tensor([1, 0]))
        for t in range(3):
            runtime.decode(ids[t : t + 2], pool, torch.tensor([0, 1]))
        pools.append(pool)
    assert all(map(torch.equal, tensors(pools[0]), tensors(pools[1])))


@torch.inference_mode()
def test_recorded_steps_take_any_kind(spec):
    runtime = TorchRuntime(model_of(spec))
    pool, plain = StatePool(spec, 4), StatePool(spec, 4)

    def recorder(function):
        output = function()
        return lambda: output.copy_(function()), output

    graphs = DecodeGraphs(runtime, pool, [2], recorder)
    for ids in torch.randint(0, 37, (3, 2)):
        slots = torch.tensor([3, 0])
        torch.testing.assert_close(graphs(ids, slots), runtime.decode(ids, plain, slots))


def test_a_runtime_refuses_a_kind_that_it_does_not_know(spec):
    from modeling.ops import chunked_gated_delta_rule
    from modeling.runtime.gpu.runtime import GpuRuntime

    with pytest.raises(UnavailableError, match="layer 1 has a AverageMixer, for which there are no kernels"):
        GpuRuntime(model_of(spec), chunked_gated_delta_rule)
    with pytest.raises(UnavailableError, match="no layer of the model is of a kind that is written in C"):
        CpuRuntime(model_of(spec_of(AVERAGE)))
    with pytest.raises(ValueError, match="another model"):
        CpuRuntime(model_of(spec)).decode(torch.tensor([0]), StatePool(spec_of(DELTA), 1), torch.tensor([0]))


def test_the_log_names_layers_that_run_in_plain_torch(spec, caplog):
    CpuRuntime(model_of(spec))
    assert "layers [1, 3] are of kinds that are not written in C++" in caplog.text


def test_every_layer_is_differentiable(spec):
    model = model_of(spec).requires_grad_()
    lengths = [70, 9]
    hidden, _ = model(torch.arange(79) % 37, [0, *itertools.accumulate(lengths)])
    model.logits(hidden).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
