"""Recorded decode steps against plain ones, with a recorder that replays by calling."""

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from recorders import CallingRecorder
from states import tensors

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.graphs import MAX_BATCH, DecodeGraphs, graph_sizes
from modeling.state import StatePool

NULL_SLOT = 5


@pytest.fixture(params=[GATED, DELTA], ids=["gated", "delta"])
def model(request, tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "c", request.param)).load()


def filled_pool(model):
    pool = StatePool(model.spec, NULL_SLOT)
    torch.manual_seed(0)
    for t in tensors(pool):
        t.copy_(torch.randn_like(t) * 0.1)
    return pool


@torch.inference_mode()
def test_any_batch_runs_on_the_smallest_graph_that_holds_it_and_touches_no_other_slot(model):
    pool, plain = filled_pool(model), filled_pool(model)
    recorder = CallingRecorder()
    graphs = DecodeGraphs(TorchRuntime(model), pool, [4, 1, 2], recorder)
    assert recorder.sizes == [4, 2, 1], "the largest first: the others reuse its memory"
    requests = [i for i in range(6) if i != NULL_SLOT]
    for t, p in zip(tensors(pool), tensors(plain), strict=True):
        assert torch.equal(t[requests], p[requests]), "recording wrote to a request's slot"

    batches = [([3, 0, 4], 4), ([2], 1), ([1, 4], 2), ([4, 3, 2, 0], 4), ([0], 1)]
    for slots, size in batches:
        slots = torch.tensor(slots)
        ids = torch.randint(0, 257, slots.shape)
        expected = TorchRuntime(model).decode(ids, plain, slots)
        hidden = graphs(ids, slots)
        assert recorder.replayed[-1] == size
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
        for t, p in zip(tensors(pool), tensors(plain), strict=True):
            torch.testing.assert_close(t[requests], p[requests], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_batch_over_the_largest_size_is_refused(model):
    graphs = DecodeGraphs(TorchRuntime(model), filled_pool(model), [2], CallingRecorder())
    with pytest.raises(ValueError, match="a batch of 3 exceeds the largest recorded size, 2"):
        graphs(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("sizes", [[], [0, 4], [-1]])
def test_batch_sizes_must_be_positive(model, sizes):
    with pytest.raises(ValueError, match="batch_sizes"):
        DecodeGraphs(TorchRuntime(model), filled_pool(model), sizes, CallingRecorder())


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 100, 511, 512, 700])
def test_sizes_reach_the_most_requests_and_pad_little(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(most, MAX_BATCH) and sizes[0] == 1
    for batch in range(9, sizes[-1] + 1):
        padded = min(s for s in sizes if s >= batch)
        assert padded - batch < max(8, batch / 4)
