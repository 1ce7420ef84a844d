"""How the memory for states is split into slots and pages, and what is said of it."""

import json

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from engine_process import engine_config
from fake_device import FakeDevice
from specs import mixer_spec

from modeling.checkpoint import open_checkpoint
from modeling.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, StateTypes
from modeling.state import StatePool
from server.engine.device import HOST
from server.engine.memory import DoesNotFitError, Needs, dense_d_k, plan_memory
from server.hub.engines import engine_configs
from server.settings import load_settings

SLOT, PAGE = 1000, 70


def plan(device=HOST, needs=Needs(0), sharing=1, page=PAGE, context_length=None, **fields):  # noqa: B008 (frozen)
    return plan_memory(
        engine_config("x", **fields), device, needs, SLOT, page, sharing, context_length=context_length
    )


@pytest.fixture(autouse=True)
def _free_memory(monkeypatch):
    monkeypatch.setattr("server.engine.device.host_memory", lambda: 1_000_000)


def best_split(memory, pages_each):
    """The most requests with that many pages each, one slot at least, and as many pages as there is room for; the null
    slot and the null page are counted. By trying them all."""
    fits = [
        (slots, pages)
        for slots in range(1, memory // SLOT + 1)
        for pages in [(memory - (slots + 1) * SLOT) // PAGE - 1]
        if pages >= (slots * pages_each if slots > 1 else 1)
    ]
    return max(fits, default=None)


@pytest.mark.parametrize("context_tokens", [1, 64, 65, 640, 4096])
def test_memory_is_split_into_requests_of_the_expected_length(context_tokens):
    pages_each = -(-context_tokens // 64)
    for memory in (*range(2140, 8000, 61), 77_777, 300_000):
        made = plan(context_tokens=context_tokens, state_memory=memory)
        assert (made.slots, made.pages) == best_split(memory, pages_each), memory
        assert made.longest == 64 * made.pages
        # The pool is what it is planned to be, and one page more would be too much.
        assert made.states == (made.slots + 1) * SLOT + (made.pages + 1) * PAGE <= memory < made.states + PAGE
        assert made.parts["states"] == (made.slots + 1) * SLOT
        assert made.parts["pages"] == (made.pages + 1) * PAGE


def test_a_cpu_has_pages_for_all_its_requests():
    made = plan(max_requests=7, context_tokens=100)
    assert (made.slots, made.pages) == (7, 14)
    made = plan(max_requests=None, context_tokens=64)
    assert (made.slots, made.pages) == (64, 64)
    # No request is expected to hold more tokens than the model's context.
    assert plan(max_requests=3, context_length=130).pages == 9
    assert plan(max_requests=3, context_tokens=64, context_length=130).pages == 3


def test_a_gpu_fills_what_is_left():
    device, needs = FakeDevice(total=1_000_000), Needs(100_000, 50_000, 20_000, 30_000)
    made = plan(device, needs, device_memory=0.5, context_tokens=640)
    assert (made.slots, made.pages) == best_split(300_000, 10)
    assert sum(made.parts.values()) == 200_000 + made.states <= 500_000
    text = [line.split()[:2] for line in str(made).splitlines()]
    assert ["pages", f"{(made.pages + 1) * PAGE:,}"] in text and [
        "total",
        f"{200_000 + made.states:,}",
    ] in text


def test_a_model_without_softmax_attention_has_no_pages():
    made = plan(page=0, state_memory=20_999, context_tokens=10**6)
    assert (made.slots, made.pages, made.longest, made.states) == (19, 0, None, 20_000)
    assert "pages" not in made.parts and "pages" not in str(made)


def refused(**fields):
    with pytest.raises(DoesNotFitError) as error:
        plan(**fields)
    return str(error.value).splitlines()


def test_what_does_not_fit_is_refused_with_the_numbers():
    least = 2 * SLOT + 2 * PAGE
    assert (plan(state_memory=least).slots, plan(state_memory=least).pages) == (1, 1)
    reason, *parts = refused(state_memory=least - 1)
    assert reason == (
        "state_memory=2139 is 2,139 bytes, and two states and two pages of keys and values, the least that a "
        "pool can have, are 2,140 bytes; raise state_memory to 2,140 bytes at least"
    )
    for part in ("states", "pages"):
        assert any(line.split()[:2] == [part, "0"] for line in parts), part
    reason, *_ = refused(max_requests=150, context_tokens=6400)
    assert reason == (
        "150 slots and 15,000 pages are 1,201,070 bytes, and 1,000,000 are left for them; set state_memory to "
        "1,000,000 bytes at most, or lower max_requests or context_tokens"
    )
    assert plan(max_requests=150, context_tokens=64).pages == 150


def hybrid(d_k=128, linear=48, attention=16):
    """The mixers of Qwen3.5-27B; nothing else of it counts here."""
    delta = mixer_spec(num_k_heads=16, num_v_heads=48, d_k=d_k, d_v=128)
    softmax = AttentionSpec(24, 4, 256, rope=None, qk_norm="head", gated=True, norm_eps=1e-6)
    return ModelSpec(
        family="qwen3_5",
        vocab_size=8,
        hidden_size=8,
        layers=tuple(
            LayerSpec(mixer, MLPSpec(8), NormSpec(1e-6))
            for mixer in (*[delta] * linear, *[softmax] * attention)
        ),
        norm=NormSpec(1e-6),
        tie_embeddings=False,
        context_length=262_144,
        eos_token_ids=(0,),
    )


TYPES = StateTypes(inputs=torch.bfloat16)


def of_model(spec, memory, **fields):
    device = FakeDevice(total=10**11)
    per_slot, per_page = spec.state_bytes(0, TYPES), 64 * spec.kv_bytes_per_token(TYPES)
    return plan_memory(
        engine_config("x", state_memory=memory, **fields), device, Needs(0), per_slot, per_page
    )


def test_a_plan_says_how_many_requests_it_means():
    """The figures of an H100 beside the weights of the 27B, worked out by hand: a dense state is 153,944,064 bytes, a
    reduced one 77,856,768, and each token adds 65,536."""
    dense, reduced = hybrid(), hybrid(64)
    assert (dense.state_bytes(0, TYPES), reduced.state_bytes(0, TYPES)) == (153_944_064, 77_856_768)
    memory = 21_800 * 10**6
    assert (
        of_model(dense, memory)
        .meaning(dense, TYPES)
        .startswith("room for 51 requests of 4,096 tokens, at most ")
    )
    made = of_model(reduced, memory)
    assert made.meaning(reduced, TYPES, dense.d_k) == (
        f"room for 62 requests of 4,096 tokens, at most 257,728 in one; 51 if the model were not reduced "
        f"(62 slots and {made.pages:,} pages)"
    )
    whole = of_model(reduced, memory, context_tokens=262_144)
    assert whole.meaning(reduced, TYPES).startswith("room for 1 request of 262,144 tokens (1 slot and ")
    # Longer requests gain less.
    long = of_model(reduced, memory, context_tokens=16_384)
    assert "room for 18 requests of 16,384 tokens" in long.meaning(reduced, TYPES, dense.d_k)
    assert "; 17 if" in long.meaning(reduced, TYPES, dense.d_k)
    # A pool for less than one such request, and one of the dense model that does not even hold that.
    small = of_model(reduced, 400 * 10**6, context_tokens=4096)
    assert small.meaning(reduced, TYPES, dense.d_k).startswith(
        f"room for 1 request of up to {small.longest:,} tokens; 0 if the model were not reduced (1 slot and "
    )
    assert "not reduced" not in made.meaning(reduced, TYPES, reduced.d_k), "only masked"


def test_a_plan_of_a_linear_model_counts_requests_of_any_length():
    dense, reduced = hybrid(attention=0), hybrid(64, attention=0)
    made = of_model(reduced, 100 * 77_856_768)
    assert made.meaning(reduced, TYPES) == "room for 99 requests of any length"
    # 7,785,676,800 bytes hold 50 dense states.
    assert made.meaning(reduced, TYPES, dense.d_k).endswith("; 49 if the model were not reduced")


def test_the_planned_pool_has_the_planned_bytes():
    spec = hybrid(8, linear=2, attention=1)
    made = of_model(spec, 4 * 10**6, context_tokens=100)
    pool = StatePool(spec, made.slots, pages=made.pages, types=TYPES)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(pool)}
    assert sum(storages.values()) == made.states
    assert pool.bytes_per_page == made.bytes_per_page and pool.pages.longest == made.longest


def _tensors(pool):
    for layer in pool.layers:
        yield from (t for t in vars(layer).values() if isinstance(t, torch.Tensor))


def test_what_a_checkpoint_was_reduced_from(tmp_path):
    path = write_checkpoint(tmp_path / "c", GATED)
    record = path / "state_reduction.json"
    assert dense_d_k(open_checkpoint(str(path))) is None
    record.write_text(json.dumps({"method": "x", "source": {"d_k": [64, 32, 48]}}))
    assert dense_d_k(open_checkpoint(str(path))) == (64, 32, 48)
    for odd in (
        [64, 64],
        [64, 64, 16],
        [64, 64, True],
        [64, 64, 10**9],
        [64, 64, 64.0],
        "64",
        None,
        [None] * 3,
    ):
        record.write_text(json.dumps({"method": "x", "source": {"d_k": odd}}))
        assert dense_d_k(open_checkpoint(str(path))) is None, odd
    for odd in ({}, {"source": None}, {"source": [1]}):
        record.write_text(json.dumps({"method": "x", **odd}))
        assert dense_d_k(open_checkpoint(str(path))) is None, odd


def test_the_expected_length_is_a_setting_of_all_variants(monkeypatch, tmp_path):
    file = tmp_path / "lowkey.toml"
    file.write_text('context_tokens = 512\n[variants]\na = "org/a"\nb = "org/b"\n')
    assert [config.context_tokens for config in engine_configs(load_settings(file))] == [512, 512]
    monkeypatch.setenv("LOWKEY_CONTEXT_TOKENS", "1000")
    assert engine_configs(load_settings(file))[0].context_tokens == 1000
    monkeypatch.delenv("LOWKEY_CONTEXT_TOKENS")
    assert engine_configs(load_settings(variants={"a": "org/a"}))[0].context_tokens == 4096
