"""Which slot has which pages: by hand, where the tests of engines go through all orders at random."""

import pytest
import torch
from fake_device import NoWaitingMode

from modeling.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, StateTypes
from modeling.state import PAGE_TOKENS, PagedKV, Pages, StatePool, kv
from modeling.state.pages import LEAST_WIDTH


@pytest.fixture
def pages():
    """Five pages of three slots, and the null slot; slot 0 has seen a page and a half."""
    pages = Pages(4, 5, 1000, "cpu")
    assert pages.longest == 5 * PAGE_TOKENS
    assert pages.grow(0, 96)
    return pages


def table(pages, slot):
    return [page for page in pages.blocks[slot].tolist() if page != pages.null_page]


def test_full_pages_are_shared_and_the_last_one_is_not(pages):
    pages.share(0, 1, 96, keep=True)
    assert pages.of(1)[0] == pages.of(0)[0] and pages.of(1)[1] != pages.of(0)[1]
    assert pages.differing(0, 1) == [(pages.of(0)[1], pages.of(1)[1])]
    assert (pages.used, pages.cached, pages.free) == (2, 1, 2)
    assert [table(pages, slot) for slot in range(4)] == [[*pages.of(slot)] for slot in range(4)]
    assert (pages.only_kept(1, 1), pages.only_kept(1, 2)) == (0, 1)
    pages.release(0)
    assert (pages.used, pages.cached, pages.free) == (0, 2, 3) and table(pages, 0) == []
    pages.run(1)
    assert (pages.used, pages.cached, pages.free) == (2, 0, 3)
    pages.release(1)
    assert (pages.used, pages.cached, pages.free) == (0, 0, 5)


@pytest.mark.parametrize("context", [100, 5000, 2**18])
def test_steps_over_few_pages_are_those_over_many(context):
    """What a step launches depends on the columns of the table."""
    few, many = (Pages(2, count, context, "cpu") for count in (1, 10_000))
    assert few.blocks.shape == many.blocks.shape == (2, -(-context // PAGE_TOKENS))
    assert few.longest == PAGE_TOKENS


def test_a_context_beyond_all_memory_takes_no_table_for_it():
    assert Pages(2, 8, 10**12, "cpu").blocks.shape == (2, LEAST_WIDTH)


def test_nothing_waits_for_the_device(pages):
    with NoWaitingMode():
        pages.set_length(0, 96)
        pages.share(0, 1, 96)
        pages.copy_length(0, 1)
        pages.advance(torch.tensor([0, 1]))
        pages.advance(torch.tensor([0, 3]), [0, 5, 7])
        pages.release(0)
    assert pages.lengths.tolist() == [102, 97, 0, 0]


def test_what_there_are_no_pages_for_changes_nothing(pages):
    pages.share(0, 1, 64)
    assert pages.grow(1, 256) and pages.free == 0
    before = pages.blocks.clone()
    assert not pages.grow(0, 129) and pages.grow(0, 128)
    with pytest.raises(RuntimeError, match="no page is free for the last 32 of 96 tokens"):
        pages.share(0, 2, 96)
    with pytest.raises(ValueError, match="321 tokens; at most 320"):
        pages.grow(0, 321)
    pages.share(0, 2, 64)
    assert pages.of(2) == pages.of(0)[:1] and (pages.blocks[:2] == before[:2]).all()


def test_a_model_without_softmax_attention_pays_for_no_lengths():
    pages = Pages(3, 0, 1000, "cpu")
    pages.set_length(0, 5)
    pages.copy_length(0, 1)
    pages.share(0, 1, 70)
    assert pages.grow(0, 10**6) and not pages.lengths.any() and pages.of(1) == []


@pytest.mark.parametrize("tokens", [0, 1, 64, 129, 300])
def test_keys_and_values_go_to_the_host_and_back_a_few_pages_at_a_time(monkeypatch, tokens):
    """The way of a GPU, whose copies are staged: here of pools on a CPU."""
    monkeypatch.setattr(kv, "STAGED", 2)
    spec = AttentionSpec(4, 2, 8, None, "none", False, 1e-6)
    pages = Pages(4, 12, 400, "cpu")
    state = PagedKV.zeros(spec, pages, StateTypes(inputs=torch.bfloat16), "cpu")
    written = torch.randn(2, tokens, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert pages.grow(2, 70) and pages.grow(0, tokens) and pages.grow(1, tokens)
    state.scatter(torch.tensor([0]), kv.KVState([written[0]], [written[1]]))
    others = state.keys[pages.of(2)].clone()
    host = state.to_host(0, tokens)
    assert torch.equal(host["keys"], written[0]) and torch.equal(host["values"], written[1])
    state._load_staged(host["keys"], state.keys, 1)
    state._load_staged(host["values"], state.values, 1)
    pages.set_length(1, tokens)
    found = state.tensors(1, tokens)
    assert all(t.is_contiguous() for t in (*found.values(), *host.values()))
    assert torch.equal(found["keys"], written[0]) and torch.equal(found["values"], written[1])
    assert torch.equal(state.keys[pages.of(2)], others)


def test_a_device_without_memory_is_a_memory_error(monkeypatch):
    layer = LayerSpec(AttentionSpec(4, 2, 8, None, "none", False, 1e-6), MLPSpec(8), NormSpec(1e-6))
    pool = StatePool(ModelSpec("test", 9, 8, (layer,), NormSpec(1e-6), False, 512, ()), 2, pages=4)
    slot = pool.allocate()

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert pool.grow(slot, 5)
    tensors = pool.to_host(slot, 5)
    monkeypatch.setattr(PagedKV, "to_host", no_memory)
    monkeypatch.setattr(PagedKV, "load", no_memory)
    with pytest.raises(MemoryError, match="^no memory on the device$"):
        pool.to_host(slot, 5)
    with pytest.raises(MemoryError, match="^no memory on the device$"):
        pool.load(slot, tensors, 5)
