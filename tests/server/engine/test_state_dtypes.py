"""Engines whose states are narrower than float32: what they compute, hold, save and fork."""

import numpy as np
import pytest
import torch
from checkpoints import GATED, write_checkpoint
from engine_process import engine_config
from engines import Bench, generate, prompt, run, sampling, tokens_of
from safetensors.torch import load_file, save_file

from modeling.checkpoint import CheckpointError
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import STATE_DTYPES, TOKEN_BLOCK
from modeling.state import DeltaState
from server.engine import process
from server.engine.process import build
from server.wire.messages import Pause, Resume, SaveState


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


def in_8_bits(state):
    """A layer's state as it would come back, by the definition: each value channel in 127ths of its largest entry."""
    recurrent = state.recurrent.numpy()
    scale = np.abs(recurrent).max(-2, keepdims=True) / 127
    codes = np.rint(recurrent / np.where(scale == 0, 1, scale))
    conv = state.conv.bfloat16().float()
    return DeltaState(torch.from_numpy((codes * scale).astype(np.float32)), conv)


@torch.inference_mode()
def reference(model, ids, first, rounded):
    """Log-probabilities after each token from `first` on, `[tokens - first, vocab]`: those before it in blocks, the
    others one by one, and the state rounded after each of these."""
    starts = [*range(0, first, TOKEN_BLOCK), *range(first, len(ids))]
    states, hidden = None, []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        piece = torch.tensor(ids[start:end])
        out, states = model(piece, [0, len(piece)], states)
        states = [rounded(state) for state in states]
        hidden.append(out[-1:])
    return model.logits(torch.cat(hidden[-(len(ids) - first + 1) :])).log_softmax(-1).numpy()


def answer(engine, message):
    """Its tokens and their log-probabilities."""
    tokens = [t for o in run(engine, {0: [message]}) for t in o.tokens]
    return [t.token_id for t in tokens], [t.logprob for t in tokens]


@pytest.mark.parametrize("length", [1, 150])
def test_int8_states_are_rounded_after_every_block_and_every_token(bench, length):
    ids = prompt(length)
    message = generate(ids, 30, logprobs=1)
    tokens, logprobs = answer(bench.engine(state_dtype="int8", batch_invariant=True), message)
    off = {}
    for name, rounded in (("rounded", in_8_bits), ("exact", lambda state: state)):
        expected = reference(bench.model, ids + tokens[:-1], length, rounded)[range(30), tokens]
        off[name] = np.abs(expected - logprobs).mean()
    # Sums in another order move a last bit of a state, and so a code here and there.
    assert off["rounded"] < 2e-3 < 1e-2 < off["exact"]
    assert answer(bench.engine(state_dtype="int8", batch_invariant=True), message) == (tokens, logprobs)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_going_on_from_a_saved_state_is_as_if_it_had_never_been_saved(bench, tmp_path, state_dtype):
    options = dict(batch_invariant=True, state_dtype=state_dtype)
    before, after = prompt(2 * TOKEN_BLOCK), prompt(40, seed=1)
    path = str(tmp_path / "state")
    save = SaveState(request_id="save", token_ids=before, path=path, fingerprint={"a": "b"})
    run(bench.engine(**options), {0: [save]})
    whole = answer(bench.engine(**options), generate([*before, *after], 20, logprobs=1))
    assert answer(bench.engine(**options), generate(after, 20, logprobs=1, state_path=path)) == whole


def test_choices_go_on_from_copies_with_their_scales(bench):
    options = dict(batch_invariant=True, state_dtype="int8")
    choices = [generate(prompt(70), 12, sampling=sampling(5, choice=i)) for i in range(3)]
    outputs = run(bench.engine(**options), {0: choices})
    assert sum(t.cached_tokens > 0 for o in outputs for t in o.tokens) == 2, "the prompt was fed once"
    tokens = tokens_of(outputs)
    for message in choices:
        assert (
            tokens_of(run(bench.engine(**options), {0: [message]}))[message.request_id]
            == tokens[message.request_id]
        )


def test_a_paused_request_finds_its_state_as_it_left_it(bench):
    options = dict(batch_invariant=True, state_dtype="int8")
    message, other = generate(prompt(70), 12), generate(prompt(9), 12)
    (expected,) = tokens_of(run(bench.engine(**options), {0: [message]})).values()
    engine = bench.engine(**options)
    pause, resume = (kind(request_id=message.request_id) for kind in (Pause, Resume))
    outputs = run(engine, {0: [message], 5: [pause, other], 12: [resume]})
    assert max(o.occupancy.paused for o in outputs) == 1
    assert tokens_of(outputs)[message.request_id] == expected


def spoil_scales(data, value):
    data["layers.1.scales"][2, 5] = value


def widen_codes(data, value):
    """Those that no state of ours has: -128, and scales below 0."""
    data["layers.0.recurrent"].fill_(-128)
    data["layers.0.scales"].fill_(value)


@pytest.mark.parametrize(
    ("spoil", "value", "broken"),
    [
        (spoil_scales, float("nan"), True),
        (spoil_scales, float("inf"), True),
        (spoil_scales, -float("inf"), True),
        (widen_codes, 3e38, True),
        (widen_codes, -0.01, False),
        (widen_codes, 1e-42, False),
    ],
)
def test_scales_that_are_no_numbers_break_their_own_request_only(bench, tmp_path, spoil, value, broken):
    path = tmp_path / "state"
    save = SaveState(request_id="save", token_ids=prompt(70), path=str(path), fingerprint={})
    engine = bench.engine(slots=2, state_dtype="int8")
    run(engine, {0: [save]})
    data = load_file(path)
    spoil(data, value)
    save_file(data, path)
    fine = generate(prompt(9), 6)
    (expected,) = tokens_of(run(engine, {0: [fine]})).values()
    odd = generate(prompt(9), 6, state_path=str(path))
    outputs = run(engine, {0: [odd, generate(prompt(9), 6, request_id="fine")]})
    assert tokens_of(outputs)["fine"] == expected
    (reason,) = (
        t.finish_reason
        for o in outputs
        for t in o.tokens
        if t.request_id == odd.request_id and t.finish_reason
    )
    assert reason == ("error" if broken else "length")
    # Nor does it stay behind in the slots.
    for _ in range(2):
        again = [generate(prompt(9), 6), generate(prompt(9), 6)]
        assert list(tokens_of(run(engine, {0: again})).values()) == [expected, expected]


def bytes_by_hand(state_dtype):
    """Bytes of one request's state: two heads of 128 by 128, and three inputs of 768 channels."""
    recurrent = {"float32": 4 * 128 * 128, "bfloat16": 2 * 128 * 128, "int8": 128 * 128 + 4 * 128}[
        state_dtype
    ]
    return 2 * recurrent + 768 * 3 * (4 if state_dtype == "float32" else 2)


def test_memory_holds_as_many_states_as_they_are_narrow(tmp_path):
    config = {**GATED, "num_hidden_layers": 1, "head_dim": 128, "num_v_heads": 2, "expand_v": 1.0}
    path = write_checkpoint(tmp_path / "c", config)
    slots = {}
    for state_dtype in STATE_DTYPES:
        _, ready = build(engine_config(path, state_memory=2**24, state_dtype=state_dtype))
        held = bytes_by_hand(state_dtype)
        assert (ready.state_dtype, ready.state_bytes_per_request) == (state_dtype, held)
        assert ready.slots == 2**24 // held - 1, "one is the null slot"
        assert ready.memory["states"] == (ready.slots + 1) * held
        assert ("layers.0.scales" in ready.state_layout) == (state_dtype == "int8")
        slots[state_dtype] = ready.slots
    assert ready.state_layout["layers.0.scales"] == ("F32", [2, 128])
    assert 1.9 < slots["bfloat16"] / slots["float32"] < 2.1
    assert 3.6 < slots["int8"] / slots["float32"] < 4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_state_dtype_that_a_gpu_has_no_kernel_for_is_refused_when_it_is_loaded(
    tmp_path, monkeypatch, batch_invariant
):
    path = write_checkpoint(tmp_path / "c", {**GATED, "head_dim": 10, "expand_v": 1.0})
    monkeypatch.setattr(process, "compile_model", lambda m: GpuRuntime(m, chunked_gated_delta_rule))
    with pytest.raises(CheckpointError, match="state_dtype='int8': .* multiple of 4, .* layer 0 is 10"):
        build(engine_config(path, state_dtype="int8", batch_invariant=batch_invariant))
