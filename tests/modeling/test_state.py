"""The slot pool: its bytes are the spec's bytes, a slot never carries anything over, and bookkeeping never slips."""

import pytest
import torch
from checkpoints import DELTA, GATED
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from states import conv, recurrent, tensors

from modeling.families import family_of
from modeling.spec import StateTypes
from modeling.state import DeltaState, StatePool
from modeling.state.rounding import narrow, widen

SPECS = {
    "gated": GATED,
    "delta": DELTA,
    "per-layer": {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]},
    "no-convolution-history": {**GATED, "conv_size": 1},
}


def spec_of(config):
    return family_of(config).spec(config)


def fill(pool, value):
    for t in tensors(pool):
        t.fill_(value)


def slot_tensors(pool, slot):
    return [t[slot] for t in tensors(pool)]


@pytest.mark.parametrize("conv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", SPECS)
def test_bytes_per_slot_are_the_specs(name, state_dtype, conv_dtype):
    spec = spec_of(SPECS[name])
    pool = StatePool(spec, 3, types=StateTypes(state_dtype, conv_dtype))
    assert pool.bytes_per_slot == spec.state_bytes(0, StateTypes(state_dtype, conv_dtype))
    assert all(t.dtype == state_dtype for t in recurrent(pool)) and all(
        t.dtype == conv_dtype for t in conv(pool)
    )
    # with the null slot
    assert sum(t.nbytes for t in tensors(pool)) == 4 * pool.bytes_per_slot
    # from the definition
    expected = expected_conv = 0
    for layer in spec.layers:
        m = layer.mixer
        expected += m.num_v_heads * m.d_k * m.d_v * state_dtype.itemsize
        width = 2 * m.num_k_heads * m.d_k + m.num_v_heads * m.d_v
        expected_conv += width * (m.conv_kernel - 1) * conv_dtype.itemsize
        if state_dtype == torch.int8:
            expected += m.num_v_heads * m.d_v * 4
    assert pool.bytes_per_slot == expected + expected_conv
    assert pool.conv_bytes_per_slot == expected_conv


def test_half_the_key_channels_halve_the_recurrent_state():
    dense, reduced = spec_of(GATED), spec_of(GATED).with_d_k((16, 16, 16))
    a, b = StatePool(dense, 1), StatePool(reduced, 1)
    assert sum(t.nbytes for t in recurrent(a)) == 2 * sum(t.nbytes for t in recurrent(b))
    # of the convolution only the q and k channels halve: 2 * 2 * 32 + 4 * 24 = 224 -> 160
    assert sum(t.nbytes for t in conv(a)) * 160 == sum(t.nbytes for t in conv(b)) * 224
    assert dense.state_bytes(0) / reduced.state_bytes(0) == pytest.approx(
        (4 * 32 * 24 + 224 * 3) / (4 * 16 * 24 + 160 * 3)
    )


def test_allocate_zeroes_a_dirty_slot_and_no_other():
    pool = StatePool(spec_of(GATED), 3)
    first, second = pool.allocate(), pool.allocate()
    fill(pool, 7.0)
    pool.free(first)
    again = pool.allocate()
    assert again == first
    assert all(not t.any() for t in slot_tensors(pool, again))
    assert all((t == 7).all() for t in slot_tensors(pool, second))


def test_a_slot_that_is_not_to_be_zeroed_is_left_as_it_was():
    pool = StatePool(spec_of(GATED), 2)
    slot = pool.allocate()
    fill(pool, 7.0)
    pool.free(slot)
    assert pool.allocate(zero=False) == slot
    assert all((t == 7).all() for t in slot_tensors(pool, slot))


def test_the_null_slot_belongs_to_nobody():
    pool = StatePool(spec_of(GATED), 2)
    assert pool.null_slot not in {pool.allocate(), pool.allocate()}
    assert pool.allocate() is None
    assert all(len(slot_tensors(pool, pool.null_slot)[i]) for i in range(3))
    with pytest.raises(ValueError, match="not in use"):
        pool.free(pool.null_slot)


def test_exhaustion_returns_none_and_a_freed_slot_is_found_again():
    pool = StatePool(spec_of(DELTA), 2)
    a, b = pool.allocate(), pool.allocate()
    assert {a, b} == {0, 1}
    assert pool.allocate() is None
    assert (pool.free_slots, pool.used_slots) == (0, 2)
    pool.free(b)
    assert pool.allocate() == b


def test_freeing_what_is_not_in_use_raises():
    pool = StatePool(spec_of(DELTA), 2)
    slot = pool.allocate()
    pool.free(slot)
    with pytest.raises(ValueError, match=f"slot {slot} is not in use"):
        pool.free(slot)
    for unknown in (1, 2, -1):
        with pytest.raises(ValueError, match=f"slot {unknown} is not in use"):
            pool.free(unknown)
    assert pool.free_slots == 2


@pytest.mark.parametrize("slots", [0, -1])
def test_a_pool_needs_a_slot(slots):
    with pytest.raises(ValueError, match=f"got {slots}"):
        StatePool(spec_of(DELTA), slots)


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        ({"recurrent": torch.int16}, "recurrent states .* floating-point dtype or int8, got torch.int16"),
        ({"inputs": torch.int8}, "inputs states .* floating-point dtype, got torch.int8"),
    ],
    ids=str,
)
def test_a_dtype_that_would_cut_states_to_whole_numbers_is_refused(types, wanted):
    with pytest.raises(ValueError, match=wanted):
        StateTypes(**types)


@pytest.mark.parametrize(
    ("name", "weights", "types"),
    [
        ("float32", torch.float32, StateTypes(torch.float32, torch.float32)),
        ("float32", torch.bfloat16, StateTypes(torch.float32, torch.bfloat16)),
        ("bfloat16", torch.float32, StateTypes(torch.bfloat16, torch.bfloat16)),
        ("int8", torch.float32, StateTypes(torch.int8, torch.bfloat16)),
    ],
    ids=str,
)
def test_a_narrow_state_keeps_its_inputs_narrow_too(name, weights, types):
    assert StateTypes.named(name, weights) == types


def test_copy_takes_everything_and_leaves_the_source():
    pool = StatePool(spec_of(SPECS["per-layer"]), 3)
    for t in tensors(pool):
        t.copy_(torch.randn_like(t))
    before = [t.clone() for t in tensors(pool)]
    pool.copy(2, 0)
    for t, old in zip(tensors(pool), before, strict=True):
        assert torch.equal(t[0], old[2])
        assert torch.equal(t[1:], old[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_and_scatter_are_by_slot_and_gather_copies(dtype):
    pool = StatePool(spec_of(SPECS["per-layer"]), 4, types=StateTypes(dtype))
    for t in tensors(pool):
        t.copy_(torch.randn_like(t))
    slots = torch.tensor([3, 1])
    state = pool.gather(slots)
    for t, got in zip(tensors(pool), tensors(state), strict=True):
        assert torch.equal(got, torch.stack([t[3], t[1]]))
    before = [t.clone() for t in tensors(pool)]
    for t in tensors(state):
        t.fill_(1.5)
    assert all(torch.equal(t, b) for t, b in zip(tensors(pool), before, strict=True))

    wide = [DeltaState(layer.recurrent.float(), layer.conv.float()) for layer in state]
    pool.scatter(torch.tensor([0, 3]), wide)
    for t, old in zip(tensors(pool), before, strict=True):
        assert (t[[0, 3]] == 1.5).all() and t.dtype == old.dtype
        assert torch.equal(t[[1, 2]], old[[1, 2]])


def test_a_state_in_8_bits_is_scattered_narrow_and_gathered_wide():
    pool = StatePool(spec_of(SPECS["per-layer"]), 4, types=StateTypes(torch.int8))
    slots = torch.tensor([3, 1])
    torch.manual_seed(0)
    wide = [DeltaState(torch.randn_like(s.recurrent), torch.randn_like(s.conv)) for s in pool.gather(slots)]
    pool.scatter(slots, wide)
    for layer, given, got in zip(pool.layers, wide, pool.gather(slots), strict=True):
        codes, scales = narrow(given.recurrent)
        assert torch.equal(layer.recurrent[slots], codes) and torch.equal(layer.scales[slots], scales)
        assert not layer.recurrent[[0, 2, 4]].any() and not layer.scales[[0, 2, 4]].any()
        assert torch.equal(got.recurrent, widen(codes, scales)) and got.scales is None
        assert torch.equal(got.conv, given.conv)
    assert {name.rpartition(".")[2] for name in pool.tensors(0, 0)} == {"recurrent", "conv", "scales"}


def test_scatter_refuses_a_state_with_other_layers():
    pool = StatePool(spec_of(GATED), 2)
    state = pool.gather(torch.tensor([0]))
    with pytest.raises(ValueError, match="zip"):
        pool.scatter(torch.tensor([0]), state[:-1])


class SlotBookkeeping(RuleBasedStateMachine):
    """Any order of allocate, write, copy and free, against a dictionary of what each slot should hold."""

    slots = Bundle("slots")

    @initialize(size=st.integers(1, 5))
    def start(self, size):
        spec = spec_of({**DELTA, "num_hidden_layers": 1, "hidden_size": 8, "expand_v": 1.0})
        self.pool = StatePool(spec, size)
        self.size = size
        self.held: dict[int, float] = {}

    @rule(target=slots, value=st.floats(0.5, 9.0, width=16))
    def allocate(self, value):
        slot = self.pool.allocate()
        if len(self.held) == self.size:
            assert slot is None
            return -1
        assert 0 <= slot < self.size and slot not in self.held
        assert all(not t.any() for t in slot_tensors(self.pool, slot))
        for t in slot_tensors(self.pool, slot):
            t.fill_(value)
        self.held[slot] = value
        return slot

    @rule(slot=consumes(slots))
    def free(self, slot):
        if slot in self.held:
            self.pool.free(slot)
            del self.held[slot]
        else:
            with pytest.raises(ValueError, match="not in use"):
                self.pool.free(slot)

    @rule(source=slots, other=slots)
    def copy(self, source, other):
        if source in self.held and other in self.held:
            self.pool.copy(source, other)
            self.held[other] = self.held[source]

    @invariant()
    def what_is_held_is_untouched(self):
        if hasattr(self, "pool"):
            assert self.pool.used_slots == len(self.held)
            assert self.pool.free_slots == self.size - len(self.held)
            for slot, value in self.held.items():
                assert all((t == value).all() for t in slot_tensors(self.pool, slot))


TestSlotBookkeeping = SlotBookkeeping.TestCase
TestSlotBookkeeping.settings = settings(max_examples=40, stateful_step_count=30)
