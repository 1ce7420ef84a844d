"""The Triton kernels of softmax attention, run by Triton's interpreter, against the definition in float64."""

import itertools

import pytest
import torch
from paged_attention import (
    HIDDEN,
    SLOTS,
    SPECS,
    TOLERANCE,
    Paged,
    by_definition,
    check_step,
    check_written,
    close,
    drawn,
    error,
    make_mixer,
    rms,
    turned,
)

from modeling.layers import AttentionMixer
from modeling.runtime.gpu import attention as module
from modeling.runtime.gpu.attention import (
    add_attention,
    add_attention_prefill,
    attention_prompts,
    attention_step,
    splits_of,
)
from modeling.spec import RopeSpec
from modeling.state import PAGE_TOKENS


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter runs one program after the other."""
    monkeypatch.setattr(module, "PROGRAMS", 12)
    monkeypatch.setattr(module, "LONG_PROGRAMS", 12)
    monkeypatch.setattr(module, "PACKED_TILES", {2: (64, 2, 4096), 4: (64, 2, 4096)})


@pytest.mark.parametrize("name", SPECS)
def test_a_step_of_any_shape(name):
    lengths = {4: 0, 1: 70, 3: 64}
    check_step(make_mixer(name), Paged(SPECS[name], lengths, torch.float32, 1), [1, 4, 3], torch.float32)


@pytest.mark.parametrize("splits", [1, 2, 5, 9])
def test_a_step_at_any_length_in_any_number_of_splits(monkeypatch, splits):
    """Most splits of a short request have nothing to do."""
    monkeypatch.setattr(module, "splits_of", lambda *_: (splits, splits))
    lengths = {0: 200, 5: 0, 1: 63, 3: 64, 4: 65, 2: 1}
    paged = Paged(SPECS["qwen"], lengths, torch.float32, 1)
    check_step(make_mixer("qwen"), paged, [3, 0, 5, 4, 1, 2], torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["qwen", "olmo", "three-to-one-wide"])
def test_a_step_in_bfloat16(monkeypatch, name, splits):
    monkeypatch.setattr(module, "splits_of", lambda *_: (splits, splits))
    dtype = torch.bfloat16
    check_step(make_mixer(name, dtype), Paged(SPECS[name], {2: 130, 0: 5}, dtype, 1), [0, 2], dtype)


def test_a_step_of_float32_over_pages_in_bfloat16():
    """What states in 8 bits have beside a model in float32."""
    mixer, paged = make_mixer("qwen"), Paged(SPECS["qwen"], {2: 130}, torch.bfloat16, 1)
    projected = drawn(mixer, 1, torch.float32)
    expected, *_ = by_definition(mixer, projected[0], *paged.history(2))
    o = attention_step(mixer, projected, paged.state, torch.tensor([2]))
    assert o.dtype == torch.float32 and error(o[0], expected) < 1e-3


def test_far_positions_turn_as_near_ones_do():
    """Angles of thousands of turns: their sines must not lose what float32 has of them."""
    mixer, paged = make_mixer("all-rotated"), Paged(SPECS["all-rotated"], {2: 0}, torch.float32, 1)
    projected = drawn(mixer, 1, torch.float32)
    far = 200_000
    paged.pages.lengths[2] = far
    paged.pages.blocks[2] = paged.pages.of(2)[0]
    module.prepared(mixer, projected, paged.state, torch.tensor([2]), None)
    s = mixer.spec
    k = rms(projected.double()[0, s.q_dim :][: s.kv_dim], mixer.k_norm.weight, s.norm_eps)
    expected = turned(k.view(-1, s.head_dim), far, s.rope)
    # float32 has 24 bits of the angle: up to 2e5 * 2^-24 radians are rounded off.
    assert error(paged.at(paged.state.keys, 2, far % PAGE_TOKENS), expected) < 2e-2


@pytest.mark.parametrize("splits", [1, 4])
def test_padding_on_the_null_slot_leaves_the_others_alone(monkeypatch, splits):
    monkeypatch.setattr(module, "splits_of", lambda *_: (splits, splits))
    mixer, paged = make_mixer("qwen"), Paged(SPECS["qwen"], {2: 70}, torch.float32, 1)
    projected, before = drawn(mixer, 4, torch.float32), paged.bits()
    expected, *kv = by_definition(mixer, projected[1], *paged.history(2))
    o = attention_step(mixer, projected, paged.state, torch.tensor([SLOTS, 2, SLOTS, SLOTS]))
    assert error(o[1], expected) < 2e-6
    check_written(paged, before, {2: kv}, torch.float32)


def test_shared_pages_are_read_by_both_and_written_by_nobody():
    paged = Paged(SPECS["qwen"], {2: 64 + 30}, torch.float32, 1)
    paged.pages.share(2, 0, 94)
    paged.state.copy(2, 0)
    paged.pages.copy_length(2, 0)
    assert paged.pages.of(0)[0] == paged.pages.of(2)[0]
    check_step(make_mixer("qwen"), paged, [0, 2], torch.float32)


def test_rows_of_a_wider_buffer_and_any_number_of_rows():
    """A row's result does not depend on the others of a batch of that size, bit for bit."""
    mixer = make_mixer("qwen")
    paged = Paged(SPECS["qwen"], {2: 70, 4: 3, 1: 100}, torch.float32, 1)
    projected = drawn(mixer, 2, torch.float32)
    wider = torch.cat([projected, torch.full_like(projected, torch.nan)], dim=1)[:, : projected.shape[1]]
    first = attention_step(mixer, projected, paged.state, torch.tensor([2, 4]))
    second = attention_step(mixer, wider, paged.state, torch.tensor([2, 1]))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_a_broken_value_stays_broken_and_in_its_slot():
    mixer, paged = make_mixer("qwen"), Paged(SPECS["qwen"], {2: 70, 4: 3}, torch.float32, 1)
    paged.at(paged.state.values, 2, 40)[:] = torch.nan
    o = attention_step(mixer, drawn(mixer, 2, torch.float32), paged.state, torch.tensor([2, 4]))
    assert not o[0].isfinite().any() and o[1].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "heads", "longest", "splits"),
    [
        *((1, 1, 4096, (128, 128)), (1, 4, 4096, (66, 66)), (1, 30, 4096, (8, 8)), (16, 4, 4096, (4, 4))),
        *((32, 4, 4096, (2, 2)), (256, 4, 4096, (1, 1)), (1024, 30, 4096, (1, 1))),
        # A pool that can hold longer requests than a few programs should read.
        *((1, 4, 262144, (66, 66)), (1, 30, 262144, (8, 64)), (8, 4, 32768, (8, 8)), (8, 4, 32832, (8, 64))),
        *((32, 4, 262144, (2, 64)), (256, 4, 262144, (1, 16)), (1024, 30, 262144, (1, 4))),
        (5000, 4, 262144, (1, 1)),
    ],
)
def test_splits_by_the_size_of_a_batch(monkeypatch, batch, heads, longest, splits):
    monkeypatch.setattr(module, "PROGRAMS", 264)
    assert splits_of(batch, heads, longest) == splits


def check_prompts(
    name: str, past: dict[int, int], lengths: dict[int, int], dtype: torch.dtype, mixer: AttentionMixer
) -> None:
    """Prompts of `lengths` tokens, one behind the other, behind the slots' `past`."""
    paged = Paged(SPECS[name], past, dtype, max(lengths.values()))
    projected, before = drawn(mixer, sum(lengths.values()), dtype), paged.bits()
    cu_seqlens = [0, *itertools.accumulate(lengths.values())]
    expected, written = [], {}
    for (slot, tokens), start in zip(lengths.items(), cu_seqlens, strict=False):
        kv = paged.history(slot)
        for row in projected[start : start + tokens]:
            o, *kv = by_definition(mixer, row, *kv)
            expected.append(o)
        written[slot] = kv
    o = attention_prompts(mixer, projected, cu_seqlens, paged.state, torch.tensor([*lengths]))
    assert o.dtype == dtype and o.shape == (len(projected), mixer.spec.q_dim)
    check_written(paged, before, written, dtype)
    for start, end in itertools.pairwise(cu_seqlens):
        assert close(o[start:end], torch.stack(expected[start:end]), TOLERANCE[dtype])


@pytest.mark.parametrize("name", SPECS)
def test_prompts_of_any_shape(name):
    past, lengths = {1: 0, 4: 50, 2: 0}, {4: 20, 1: 1, 2: 5}
    check_prompts(name, past, lengths, torch.float32, make_mixer(name))


@pytest.mark.parametrize("past", [0, 1, 63, 64, 130])
def test_prompts_behind_any_past(past):
    lengths = {3: 67, 0: 1}
    check_prompts("qwen", {3: past, 0: past}, lengths, torch.float32, make_mixer("qwen"))


def test_prompts_in_the_tiles_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    check_prompts("qwen", {3: 70, 0: 0}, {0: 3, 3: 45}, torch.float32, make_mixer("qwen"))


@pytest.mark.parametrize("name", ["qwen", "olmo", "three-to-one-wide"])
def test_prompts_in_bfloat16(name):
    mixer = make_mixer(name, torch.bfloat16)
    check_prompts(name, {3: 70, 0: 0}, {0: 3, 3: 70}, torch.bfloat16, mixer)


def test_prompts_that_no_slot_has_pages_for_stay_on_the_null_page():
    """So an engine measures the memory of its largest step."""
    paged = Paged(SPECS["qwen"], {2: 70}, torch.float32, width=2)
    # What lies behind the table is no page of its slot.
    paged.pages.blocks = torch.cat([paged.pages.blocks, torch.zeros(1, 2, dtype=torch.int32)])[:-1]
    mixer, before = make_mixer("qwen"), paged.bits()
    paged.state.keys[-1], paged.state.values[-1] = 0, 0
    tokens = 3 * PAGE_TOKENS + 5
    o = attention_prompts(
        mixer, drawn(mixer, tokens, torch.float32), [0, 3, tokens], paged.state, torch.tensor([SLOTS] * 2)
    )
    assert o.isfinite().all() and all(map(torch.equal, before, paged.bits()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.inference_mode()
def test_a_prompt_in_pieces_and_steps_is_that_prompt(dtype):
    """With both products and the residual, against the mixer's own forward in float64."""
    mixer = make_mixer("qwen", dtype)
    paged = Paged(SPECS["qwen"], {4: 0}, dtype, 100)
    torch.manual_seed(5)
    x, residual = torch.randn(2, 100, HIDDEN).to(dtype)
    exact = AttentionMixer(mixer.spec, HIDDEN, 0).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    expected = residual.double() + exact(x.double(), [0, 100])[0]
    slots, made = torch.tensor([4]), []
    for start, end in ((0, 64), (64, 71), (71, 98), (98, 99), (99, 100)):
        args = (mixer, x[start:end], None, residual[start:end].clone())
        if end - start > 1:
            made.append(add_attention_prefill(*args, [0, end - start], paged.state, slots, None))
        else:
            made.append(add_attention(*args, paged.state, slots))
        paged.pages.advance(slots, [0, end - start])
    assert error(torch.cat(made), expected) < TOLERANCE[dtype]


def test_without_a_residual_there_is_new_memory():
    mixer, paged = make_mixer("olmo"), Paged(SPECS["olmo"], {2: 5}, torch.float32, 1)
    x = torch.randn(1, HIDDEN)
    kept, residual = x.clone(), torch.randn(1, HIDDEN)
    y = add_attention(mixer, x, None, None, paged.state, torch.tensor([2]))
    assert torch.equal(x, kept)
    added = add_attention(mixer, x, None, residual.clone(), paged.state, torch.tensor([2]))
    torch.testing.assert_close(added, residual + y)


def test_frequencies_stay_where_recorded_steps_read_them():
    ropes = [RopeSpec(4, 1e4 + i) for i in range(40)]
    made = [module.frequencies(rope, torch.device("cpu")) for rope in ropes]
    assert all(
        module.frequencies(rope, torch.device("cpu")) is t for rope, t in zip(ropes, made, strict=True)
    )


def test_float64_is_refused():
    mixer, paged = make_mixer("olmo"), Paged(SPECS["olmo"], {2: 5}, torch.float32, 1)
    with pytest.raises(ValueError, match="float64"):
        attention_step(mixer, drawn(mixer, 1, torch.float64), paged.state, torch.tensor([2]))
