"""What an engine says of other memory plans than its own, against pools that are really made."""

from pathlib import Path

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from engine_process import engine_config
from fake_device import FakeDevice
from hybrid_cases import CASES
from hybrids import write_hybrid
from reducing import random_keep, reduce

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime, UnavailableError
from modeling.spec import STATE_DTYPES, StateTypes
from modeling.state import StatePool
from server.engine.memory import RESERVED
from server.engine.process import build

ROOT = Path(__file__).parents[3]
DEMOS = {"demo": ROOT / "demo" / "model", "demo-hybrid": ROOT / "demo" / "hybrid"}
FIXTURES = ("vl-dense-odd-irregular", "vl-dense-bf16")


@pytest.fixture(scope="module", params=[*DEMOS, *FIXTURES])
def path(request, tmp_path_factory):
    if request.param in DEMOS:
        return DEMOS[request.param]
    return write_hybrid(tmp_path_factory.mktemp("hybrid") / "c", CASES[request.param])


def planned(path, device=None, **fields):
    _, ready = build(engine_config(path, max_requests=2, **fields), device)
    return ready


def pool_bytes(spec, slots, pages, types):
    """Bytes of the tensors of all layers."""
    pool = StatePool(spec, slots, pages=pages, types=types)
    tensors = [t for layer in pool.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def check(sizes, spec, weights):
    """Slot and page of each dtype are what one more of them adds to a pool."""
    assert list(sizes) == list(STATE_DTYPES)
    for name, found in sizes.items():
        types = StateTypes.named(name, weights)
        base = pool_bytes(spec, 2, 3, types)
        assert found.state_bytes == pool_bytes(spec, 3, 3, types) - base, name
        assert found.kv_bytes_per_page == pool_bytes(spec, 2, 4, types) - base, name


def test_bytes_in_each_dtype_here_and_on_a_gpu(path):
    ready, spec = planned(path), open_checkpoint(str(path)).spec
    plan = ready.planning
    check(plan.here.state_dtypes, spec, torch.float32)
    check(plan.gpu.state_dtypes, spec, torch.bfloat16)
    own = plan.here.state_dtypes[ready.state_dtype]
    assert (own.state_bytes, own.kv_bytes_per_page) == (ready.state_bytes_per_request, ready.bytes_per_page)
    assert plan.budget is None and plan.here.other_bytes == ready.weights_bytes
    assert plan.context_length == spec.context_length
    assert plan.context_tokens == min(4096, spec.context_length)
    assert plan.dense_d_k is None and plan.here.dense is None


def test_what_a_gpu_is_said_to_need_before_there_is_one(path):
    total = 2**34
    there = planned(path, FakeDevice(total=total), dtype="auto", device_memory=0.5)
    plan = there.planning
    assert plan.budget == total // 2 and plan.gpu == plan.here
    measured = there.memory["workspace"] + there.memory["graphs"]
    assert plan.here.other_bytes == there.weights_bytes + measured + RESERVED
    here = planned(path).planning
    assert here.gpu.other_bytes == there.weights_bytes + RESERVED
    assert here.gpu.state_dtypes == plan.gpu.state_dtypes


def test_a_reduced_model_says_what_it_was(path, tmp_path):
    checkpoint = open_checkpoint(str(path))
    spec = checkpoint.spec
    widths = [max(1, d_k // 2) for d_k in spec.d_k]
    reduce(checkpoint, random_keep(spec, widths), tmp_path / "reduced")
    found, dense = planned(tmp_path / "reduced").planning, planned(path).planning
    assert found.dense_d_k == list(spec.d_k)
    assert found.here.dense == dense.here.state_dtypes and found.gpu.dense == dense.gpu.state_dtypes
    assert found.here.state_dtypes["float32"].state_bytes < dense.here.state_dtypes["float32"].state_bytes
    assert found.here.dense["int8"].kv_bytes_per_page == found.here.state_dtypes["int8"].kv_bytes_per_page


def test_dtypes_that_can_not_be_computed_are_left_out(tmp_path, monkeypatch):
    def refuse(self, types):
        if types.recurrent == torch.int8:
            raise UnavailableError("no int8 here")

    monkeypatch.setattr(TorchRuntime, "check_states", refuse)
    plan = planned(write_checkpoint(tmp_path / "c", GATED), FakeDevice(), dtype="auto").planning
    assert list(plan.here.state_dtypes) == ["float32", "bfloat16"]
