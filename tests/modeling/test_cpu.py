"""The compiled decode step against the same model in float64, and how it is built."""

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from specs import mixer_spec
from states import error_in_steps, exact_states, fill, recurrent, tensors
from torch import nn

from modeling.checkpoint import open_checkpoint
from modeling.model import Model
from modeling.runtime import TorchRuntime, UnavailableError, compile_model
from modeling.runtime.cpu import CpuRuntime, build
from modeling.spec import FLOAT32_STATES, LayerSpec, MLPSpec, ModelSpec, NormSpec, StateTypes
from modeling.state import StatePool
from modeling.state.rounding import narrow
from pruning.calibration import Encoder, bundled_text
from pruning.evaluation import evaluation_windows

FLOAT32, BFLOAT16, INT8 = torch.float32, torch.bfloat16, torch.int8


def spec_of(hidden=24, intermediate=20, vocab=37, tied=False, layers=1, **mixer):
    mixer = dict(num_k_heads=2, num_v_heads=2, d_k=8, d_v=8) | mixer
    layer = LayerSpec(mixer_spec(**mixer), MLPSpec(intermediate), NormSpec(1e-6))
    return ModelSpec("test", vocab, hidden, (layer,) * layers, NormSpec(1e-6), tied, 64, ())


def model_of(spec, seed=0):
    torch.manual_seed(seed)
    model = Model(spec).requires_grad_(False)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
        if "norm" in name:
            p += 1
    return model


def exact_model_of(spec, seed, weights):
    """The same in float64. Products with bfloat16 weights take bfloat16 inputs: what was rounded, in full precision."""
    model = model_of(spec, seed).to(weights).double()
    if weights == BFLOAT16:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, x: x[0].to(BFLOAT16).double())
    return model


def pools_of(spec, slots, seed=1, types=FLOAT32_STATES):
    """A pool with random states, and the same in float64."""
    pool = StatePool(spec, slots, types=types)
    fill(pool, seed)
    exact = StatePool(spec, slots, types=StateTypes(torch.float64, torch.float64))
    exact.layers = [exact_states(layer) for layer in pool.layers]
    return pool, exact


def difference(a, b):
    """Largest, relative to the largest; NaN (which compares as no difference) never passes."""
    assert a.shape == b.shape and a.isfinite().all()
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) if b.numel() else 0.0


def check(spec, batch, *, weights=FLOAT32, state=FLOAT32, conv=FLOAT32, seed=0):
    """Steps of `batch` requests in random slots of a larger pool, against float64 with the same numbers."""
    model = model_of(spec, seed).to(weights)
    exact = exact_model_of(spec, seed, weights)
    runtime = CpuRuntime(model)
    pool, exact_pool = pools_of(spec, batch + 3, types=StateTypes(state, conv))
    before = [t.clone() for t in tensors(pool)]
    torch.manual_seed(seed)
    slots = torch.randperm(batch + 3)[:batch]
    others = torch.ones(batch + 4, dtype=torch.bool).index_fill(0, slots, False)
    # A float32 step differs by its roundings. bfloat16 rounds what is stored and returned to 8 bits, which the norms of
    # a second step would magnify; after a step in int8 the exact states are others.
    rounded = BFLOAT16 in (weights, state, conv) or state == INT8
    tolerance = 2e-2 if rounded else 1e-4
    for _ in range(1 if rounded else 2):
        ids = torch.randint(0, spec.vocab_size, (batch,))
        hidden = runtime.decode(ids, pool, slots)
        expected = TorchRuntime(exact).decode(ids, exact_pool, slots)
        assert hidden.dtype == weights
        assert difference(hidden, expected) < tolerance
        logits = runtime.logits(hidden)
        assert difference(logits, hidden.double() @ exact.lm_head.weight.T) < 1e-5
    for ours, theirs in zip(pool.layers, exact_pool.layers, strict=True):
        assert difference(ours.conv, theirs.conv) < tolerance
        if state == INT8:
            assert error_in_steps(ours, theirs.recurrent) < (2.5 if BFLOAT16 in (weights, conv) else 0.01)
        else:
            assert difference(ours.recurrent, theirs.recurrent) < tolerance
    for ours, old in zip(tensors(pool), before, strict=True):
        assert torch.equal(ours[others], old[others])


DTYPES = st.sampled_from([FLOAT32, BFLOAT16])


SHAPES = st.fixed_dictionaries(
    {
        "hidden": st.integers(8, 70),
        "intermediate": st.integers(4, 70),
        "vocab": st.integers(8, 50),
        "tied": st.booleans(),
        "layers": st.integers(1, 2),
        "num_k_heads": st.integers(1, 3),
        "d_k": st.integers(3, 40),
        "d_v": st.integers(8, 150),
        "conv_kernel": st.integers(1, 6),
        "conv_bias": st.booleans(),
        "has_decay": st.booleans(),
        "has_beta": st.booleans(),
        "beta_scale": st.sampled_from([1.0, 2.0]),
        "gate": st.sampled_from(["none", "silu", "sigmoid"]),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=SHAPES,
    groups=st.integers(1, 3),
    batch=st.integers(1, 70),
    weights=DTYPES,
    state=st.sampled_from([FLOAT32, BFLOAT16, INT8]),
    conv=DTYPES,
    seed=st.integers(0, 100),
)
@example({"d_k": 128, "d_v": 128, "num_k_heads": 2, "hidden": 256}, 1, 63, FLOAT32, FLOAT32, FLOAT32, 0)
@example({"d_k": 96, "d_v": 192, "num_k_heads": 1}, 2, 1, FLOAT32, FLOAT32, FLOAT32, 0)
@example({"d_k": 128, "d_v": 128, "num_k_heads": 2}, 1, 5, FLOAT32, INT8, FLOAT32, 0)
@example({"d_k": 13, "d_v": 149, "num_k_heads": 2}, 2, 3, FLOAT32, INT8, BFLOAT16, 0)
def test_a_step_of_any_shape_is_that_of_float64(shape, groups, batch, weights, state, conv, seed):
    spec = spec_of(**shape, num_v_heads=shape["num_k_heads"] * groups)
    check(spec, batch, weights=weights, state=state, conv=conv, seed=seed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=SHAPES,
    groups=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    weights=DTYPES,
    begun=st.booleans(),
    seed=st.integers(0, 100),
)
@example({"d_k": 128, "d_v": 128, "num_k_heads": 2, "hidden": 256}, 1, [150, 1, 300], FLOAT32, True, 0)
@example({"d_k": 24, "d_v": 40, "num_k_heads": 2, "conv_kernel": 40}, 2, [5, 39, 90], FLOAT32, True, 0)
def test_prompts_of_any_shape_are_those_of_float64(shape, groups, lengths, weights, begun, seed):
    spec = spec_of(**shape, num_v_heads=shape["num_k_heads"] * groups)
    model, exact = model_of(spec, seed).to(weights), exact_model_of(spec, seed, weights)
    runtime = CpuRuntime(model)
    pool, exact_pool = pools_of(spec, len(lengths))
    slots = torch.arange(len(lengths))
    if not begun:
        for slot in slots.tolist():
            for layer in (*pool.layers, *exact_pool.layers):
                layer.zero(slot)
    ids, offsets = torch.randint(0, spec.vocab_size, (sum(lengths),)), [0, *itertools.accumulate(lengths)]
    hidden = runtime.prefill(ids, offsets, pool, slots)
    expected, exact_after = exact(ids, offsets, exact_pool.gather(slots))
    tolerance = 2e-2 if weights == BFLOAT16 else 1e-4
    assert hidden.dtype == weights
    assert difference(hidden, expected) < tolerance
    for ours, theirs in zip(tensors(pool.gather(slots)), tensors(exact_after), strict=True):
        assert ours.dtype == FLOAT32 and difference(ours, theirs) < tolerance
    null, exact_null = (tensors(p.gather(torch.tensor([p.null_slot]))) for p in (pool, exact_pool))
    assert all(torch.equal(a.double(), b) for a, b in zip(null, exact_null, strict=True))


@torch.inference_mode()
def test_bfloat16_weights_keep_the_perplexity():
    checkpoint = open_checkpoint(str(Path(__file__).parents[2] / "demo" / "model"))
    windows = evaluation_windows(Encoder(checkpoint), bundled_text("heldout"), tokens=4096)
    losses = []
    for dtype in (FLOAT32, BFLOAT16):
        model = checkpoint.load(dtype=dtype)
        runtime = CpuRuntime(model)
        pool = StatePool(model.spec, len(windows), types=StateTypes(inputs=dtype))
        total = 0.0
        for t in range(windows.shape[1] - 1):
            logits = runtime.logits(runtime.decode(windows[:, t], pool, torch.arange(len(windows))))
            total += float(F.cross_entropy(logits.float(), windows[:, t + 1]))
        losses.append(total / (windows.shape[1] - 1))
    assert abs(losses[1] - losses[0]) < 1e-3  # 0.1 % of the perplexity


def test_layers_of_different_widths():
    spec = spec_of(layers=3)
    check(spec.with_d_k((3, 8, 5)), 5)


def test_several_threads_give_the_bits_of_one():
    spec = spec_of(hidden=64, intermediate=96, layers=2)
    model = model_of(spec)
    runtime = CpuRuntime(model)
    ids, slots = torch.arange(13), torch.randperm(16)[:13]
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            pool, _ = pools_of(spec, 16)
            results.append([runtime.decode(ids, pool, slots), *tensors(pool)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_request_and_shows(bad):
    spec = spec_of()
    model = model_of(spec)
    runtime = CpuRuntime(model)
    for batch in (1, 2, 3, 5, 40):
        clean, _ = pools_of(spec, batch)
        broken, _ = pools_of(spec, batch)
        recurrent(broken)[0][batch // 2, 1, 2, 3] = bad
        ids, slots = torch.arange(batch) % 37, torch.arange(batch)
        expected, hidden = runtime.decode(ids, clean, slots), runtime.decode(ids, broken, slots)
        others = slots != batch // 2
        assert torch.equal(hidden[others], expected[others])
        assert not hidden[batch // 2].isfinite().all()
        assert not runtime.logits(hidden)[batch // 2].isfinite().all()


def test_extreme_inputs_neither_overflow_nor_vanish():
    spec = spec_of()
    model, exact = model_of(spec), model_of(spec).double()
    for m in (model, exact):  # saturated gates, decays of 0 and 1, activations of 1e3 and 1e-30
        m.layers[0].mixer.in_proj.weight *= 300
        m.embeddings.weight[0] = 1e-30
    runtime = CpuRuntime(model)
    pool, exact_pool = pools_of(spec, 8)
    recurrent(pool)[0][:2] *= 1e-38  # denormal: taken as zero
    recurrent(exact_pool)[0][:2] = 0
    ids, slots = torch.arange(8), torch.arange(8)
    assert (
        difference(runtime.decode(ids, pool, slots), TorchRuntime(exact).decode(ids, exact_pool, slots))
        < 1e-4
    )
    assert difference(recurrent(pool)[0], recurrent(exact_pool)[0]) < 1e-4


def test_what_is_out_of_range_is_refused_before_anything_moves():
    spec = spec_of()
    model = model_of(spec)
    runtime = CpuRuntime(model)
    pool, _ = pools_of(spec, 4)
    before = recurrent(pool)[0].clone()
    one = torch.tensor
    for ids, slots in ((one([0, 37]), one([0, 1])), (one([0, -1]), one([0, 1]))):
        with pytest.raises(IndexError, match="token id"):
            runtime.decode(ids, pool, slots)
    for slot in (pool.null_slot + 1, -1):
        with pytest.raises(IndexError, match="slot"):
            runtime.decode(one([0, 1]), pool, one([0, slot]))
    with pytest.raises(ValueError, match="int64"):
        runtime.decode(one([0, 1]).int(), pool, one([0, 1]))
    with pytest.raises(ValueError, match="int64"):
        runtime.decode(one([0, 1]), pool, one([0]))
    with pytest.raises(ValueError, match="another"):
        runtime.decode(one([0]), StatePool(spec_of(d_k=9), 4), one([0]))
    with pytest.raises(ValueError, match="multiply"):
        runtime.logits(torch.zeros(1, 25))
    assert torch.equal(recurrent(pool)[0], before)
    assert runtime.decode(one([], dtype=torch.long), pool, one([], dtype=torch.long)).shape == (0, 24)


def test_a_prompts_states_must_be_those_of_its_sequences():
    spec = spec_of()
    runtime, ids = CpuRuntime(model_of(spec)), torch.arange(10)
    pool, _ = pools_of(spec, 4)
    before = [t.clone() for t in tensors(pool)]
    for slots in ([0], [0, 1, 2]):
        with pytest.raises(ValueError, match=f"{len(slots)} states in torch.float32 for 2 sequences"):
            runtime.prefill(ids, [0, 5, 10], pool, torch.tensor(slots))
    for slot in (pool.null_slot + 1, -1):
        with pytest.raises(IndexError, match="slot"):
            runtime.prefill(ids, [0, 5, 10], pool, torch.tensor([0, slot]))
    with pytest.raises(IndexError, match="token id"):
        runtime.prefill(ids + 30, [0, 5, 10], pool, torch.tensor([0, 1]))
    assert all(map(torch.equal, tensors(pool), before))


@torch.inference_mode()
def test_prompts_with_states_in_8_bits_are_those_of_float32_rounded_once():
    spec = spec_of(d_k=24, d_v=19, layers=2, conv_kernel=1)
    runtime = CpuRuntime(model_of(spec))
    pool, _ = pools_of(spec, 3, types=StateTypes(INT8))
    wide, _ = pools_of(spec, 3)
    slots, ids = torch.tensor([2, 0]), torch.randint(0, spec.vocab_size, (150,))
    wide.scatter(slots, pool.gather(slots))
    others = [t[1].clone() for t in tensors(pool)]
    assert torch.equal(*(runtime.prefill(ids, [0, 70, 150], p, slots) for p in (pool, wide)))
    for ours, theirs in zip(pool.layers, wide.gather(slots), strict=True):
        codes, scales = narrow(theirs.recurrent)
        assert torch.equal(ours.recurrent[slots], codes) and torch.equal(ours.scales[slots], scales)
    assert all(map(torch.equal, others, [t[1] for t in tensors(pool)]))


@torch.inference_mode()
def test_a_broken_state_in_8_bits_stays_broken_and_in_its_slot():
    """A value that is NaN or Inf must not become a number: the engine tells the client by it."""
    spec = spec_of(d_k=8, d_v=37)
    runtime = CpuRuntime(model_of(spec))
    for value in (float("nan"), float("inf")):
        pool, _ = pools_of(spec, 3, types=StateTypes(INT8))
        pool.layers[0].conv[1].fill_(value)
        for _ in range(2):
            hidden = runtime.decode(torch.tensor([3, 4]), pool, torch.tensor([0, 1]))
            assert hidden[0].isfinite().all() and not hidden[1].isfinite().any()
        assert not pool.layers[0].scales[1].isfinite().any() and pool.layers[0].scales[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_states_that_it_would_misread_are_refused(dtype):
    spec = spec_of()
    runtime, one = CpuRuntime(model_of(spec)), torch.tensor([0])
    for types in (StateTypes(dtype), StateTypes(inputs=dtype)):
        with pytest.raises(ValueError, match=f"float32 or bfloat16 on the CPU, or .* got {dtype}"):
            runtime.decode(one, StatePool(spec, 2, types=types), one)


@pytest.mark.parametrize("weights", [FLOAT32, BFLOAT16])
def test_a_model_on_a_cpu_is_compiled_and_nothing_is_said(caplog, weights):
    model = model_of(spec_of()).to(weights)
    runtime = compile_model(model)
    assert isinstance(runtime, CpuRuntime) and runtime.name == "cpu" and runtime.model is model
    assert not caplog.records


def test_shapes_and_dtypes_that_it_does_not_take_go_to_torch_and_the_log_says_so(caplog):
    for model in (model_of(spec_of()).double(), model_of(spec_of(vocab=7))):
        caplog.clear()
        assert compile_model(model).name == "torch"
        assert "plain torch" in caplog.text and caplog.records[0].levelno == logging.WARNING


class TestBuild:
    @pytest.fixture(autouse=True)
    def _fresh(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        build.compiled.cache_clear()
        yield
        build.compiled.cache_clear()

    def test_without_a_compiler_torch_runs_and_the_log_says_so(self, monkeypatch, caplog):
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert compile_model(model_of(spec_of())).name == "torch"
        assert "'no-such-compiler' is not on PATH); install g++ or set CXX" in caplog.text

    def test_a_compiler_that_fails_leaves_nothing_behind(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", "g++ -no-such-option")
        with pytest.raises(UnavailableError, match="no-such-option"):
            build.compiled()
        assert [p.name for p in (tmp_path / "lowkey").iterdir()] == ["model.lock"]

    def test_nowhere_to_write(self, monkeypatch, tmp_path):
        (tmp_path / "lowkey").write_text("a file where the folder should be")
        with pytest.raises(UnavailableError, match="XDG_CACHE_HOME"):
            build.compiled()

    def test_a_damaged_library_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "_compile", lambda target: target.write_bytes(b"\x7fELF"))
        with pytest.raises(UnavailableError, match=r"model-.*\.so"):
            build.compiled()

    def test_processes_that_start_at_once_compile_once(self, tmp_path, monkeypatch):
        count = tmp_path / "count"
        compiler = tmp_path / "compiler"
        compiler.write_text(f'#!/bin/sh\necho x >> "{count}"\nexec g++ "$@" -O0\n')
        compiler.chmod(0o755)
        code = "from modeling.runtime.cpu.build import compiled; compiled().lowkey_layout"
        environment = {**os.environ, "CXX": str(compiler)}
        started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
        assert [p.wait(timeout=600) for p in started] == [0, 0, 0]
        assert count.read_text() == "x\n"
        assert sorted(p.suffix for p in (tmp_path / "lowkey").iterdir()) == [".lock", ".so"]
