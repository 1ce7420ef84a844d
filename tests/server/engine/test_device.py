"""Steps that overlap on a device with a clock of its own: what is launched before what is waited for, and that tokens
are those of the plain loop all the same. And devices without memory."""

import pytest
import torch
from checkpoints import GATED
from engines import Bench, generate, prompt, run, sampling, score, tokens_of
from fake_device import FakeDevice, NoWaitingMode

from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.wire.messages import Abort

HOST_S = 0.4
"""Seconds of the host's work for a step, by the device's clock; a step takes the device 1 s."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


class Setup:
    """An engine on a fake device, with recorded steps for up to `largest` requests."""

    def __init__(
        self, bench, *, slots=8, largest=(1, 2, 4, 8), depth=1, prefix_cache=False, kind=TorchRuntime
    ):
        self.device = FakeDevice()
        self.pool = StatePool(bench.model.spec, slots)
        runtime = kind(bench.model)
        graphs = DecodeGraphs(runtime, self.pool, largest, self.device.recorder())
        self.device.events.clear()
        self.runner = Runner(runtime, self.pool, device=self.device, graphs=graphs)
        cache = StateCache(self.pool, prefix_cache=prefix_cache)
        self.engine = Engine(Scheduler(cache, 128), self.runner, depth)

    def run(self, arrivals):
        """As `engines.run`, while the host takes its time over each step."""
        step = self.engine.step

        def timed():
            self.device.now += HOST_S
            return step()

        self.engine.step = timed
        return run(self.engine, arrivals)

    def of(self, *kinds):
        return [e for e in self.device.events if e[0] in kinds]


def mixed():
    """Greedy and drawn requests, with filters, penalties and log-probabilities among them."""
    return [
        generate(prompt(5, seed=1), 9),
        generate(prompt(70, seed=2), 6, sampling=sampling(seed=3, temperature=0.8)),
        generate(prompt(20, seed=3), 12, logprobs=2),
        generate(prompt(33, seed=4), 3, sampling=sampling(seed=9)),
        generate(prompt(150, seed=5), 7),
    ]


def test_the_next_step_is_launched_before_the_last_one_is_waited_for(bench):
    setup = Setup(bench, slots=1)
    message = generate(prompt(5), 10)
    tokens = tokens_of(setup.run({0: [message]}))
    assert bench.check_tokens(message, tokens[message.request_id]) == 10
    # The prompt's step, then nine decodes: step n + 1 is on its way when somebody waits for step n, but for the last.
    assert [n for _, n in setup.of("seal")] == [n for _, n in setup.of("wait")] == list(range(10))
    events = setup.device.events
    for n in range(9):
        assert events.index(("seal", n + 1)) < events.index(("wait", n))
        assert n == 0 or events.index(("wait", n - 1)) < events.index(("seal", n + 1)), (
            "more than one step ahead"
        )


@pytest.mark.parametrize(("depth", "seconds"), [(0, 20 * (HOST_S + 1)), (1, 20 * 1)])
def test_the_hosts_work_hides_behind_the_devices(bench, depth, seconds):
    setup = Setup(bench, slots=1, depth=depth)
    setup.run({0: [generate(prompt(5), 21)]})
    assert setup.device.now == pytest.approx(seconds, abs=3 * HOST_S)


def test_one_copy_and_one_wait_for_each_step(bench):
    setup = Setup(bench, slots=4)
    setup.run({0: [generate(prompt(9, seed=i), 6) for i in range(4)]})
    # Four requests' tokens are sampled at once: one tensor each step.
    assert [n for _, n in setup.of("copy")] == [n for _, n in setup.of("wait")] == list(range(6))


@pytest.mark.parametrize("largest", [(1, 2, 4, 8), (1, 3)], ids=["all", "eager above 3"])
@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_are_the_plain_loops(bench, depth, largest):
    messages = mixed()
    setup = Setup(bench, largest=largest, depth=depth)
    tokens = tokens_of(setup.run({0: messages[:2], 2: messages[2:4], 5: messages[4:]}))
    for m in messages:
        assert len(tokens[m.request_id]) == m.max_tokens
        bench.check_tokens(m, tokens[m.request_id])


def test_a_batch_runs_on_the_smallest_recorded_size_that_holds_it(bench):
    setup = Setup(bench, slots=8)
    setup.run({0: [generate(prompt(3, seed=i), 2 + i) for i in range(7)]})
    # Seven, then one fewer each step.
    assert [size for _, size in setup.of("replay")] == [8, 8, 8, 4, 4, 2, 1]


def test_a_batch_above_the_largest_size_is_launched_by_itself(bench):
    setup = Setup(bench, slots=4, largest=(1, 2))
    setup.run({0: [generate(prompt(3, seed=i), 2 + i) for i in range(4)]})
    assert [size for _, size in setup.of("replay")] == [2, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token", [0, 5, 256])
def test_a_single_logit_that_is_no_number_ends_its_own_request_only(bench, token, dtype, value):
    class Breaks(TorchRuntime):
        def logits(self, hidden):
            logits = super().logits(hidden).to(dtype)
            if len(logits) == 3:
                logits[1, token] = value
            return logits

    messages = [generate(prompt(5, seed=i), 4) for i in range(3)]
    outputs = Setup(bench, kind=Breaks).run({0: messages})
    ends = {t.request_id: t.finish_reason for o in outputs for t in o.tokens if t.finish_reason}
    assert [ends[m.request_id] for m in messages] == ["length", "error", "length"]


def test_a_slot_is_freed_only_when_no_launched_step_uses_it(bench, monkeypatch):
    setup = Setup(bench, slots=3)
    flying: list[set[int]] = []
    launch, sample, free = setup.runner.launch, setup.runner.sample, setup.pool.free
    freed_under_way = []

    def launched(batch):
        forward = launch(batch)
        flying.append({r.slot for r in batch.requests})
        return forward

    def sampled(forward, masks):
        pending = sample(forward, masks)
        collect = pending.collect

        def collected():
            result = collect()
            flying.pop(0)
            return result

        pending.collect = collected
        return pending

    def freed(slot):
        # Its own step is taken off the list before anything of it is freed.
        freed_under_way.extend(slot for slots in flying if slot in slots)
        free(slot)

    monkeypatch.setattr(setup.runner, "launch", launched)
    monkeypatch.setattr(setup.runner, "sample", sampled)
    monkeypatch.setattr(setup.pool, "free", freed)
    stops = generate(prompt(30), 30)
    (plain,) = tokens_of(run(bench.engine(slots=1), {0: [stops]})).values()
    ends = generate(prompt(30), 30, stop_token_ids=[plain[4]])
    other, victim = generate(prompt(9), 12), generate(prompt(12), 30)
    later = generate(prompt(40), 5)
    outputs = setup.run({0: [ends, other, victim], 6: [Abort(request_id=victim.request_id), later]})
    assert not freed_under_way
    tokens = {}
    for output in outputs:
        for token in output.tokens:
            tokens.setdefault(token.request_id, []).append(token.token_id)
    # It stopped while its next step was under way: that step's token is not told.
    assert tokens[ends.request_id] == plain[: plain.index(plain[4]) + 1]
    for m in (other, later):
        assert len(tokens[m.request_id]) == m.max_tokens
        bench.check_tokens(m, tokens[m.request_id])
    assert setup.engine.idle and setup.pool.used_slots == 0


def test_nothing_in_a_launch_waits_for_the_device(bench, monkeypatch):
    setup = Setup(bench, prefix_cache=True)
    launch = setup.runner.launch

    def guarded(batch):
        with NoWaitingMode():
            return launch(batch)

    monkeypatch.setattr(setup.runner, "launch", guarded)
    penalised = sampling(seed=4, top_k=5, top_p=0.9, min_p=0.01, presence_penalty=0.5, logit_bias={3: 1.0})
    more = [
        generate(prompt(80, seed=9), 5, sampling=penalised, min_tokens=2, stop_token_ids=[0]),
        generate(prompt(70, seed=8), 5, sampling=sampling(seed=3, allowed_token_ids=[1, 2, 3])),
        score(prompt(90), top_logprobs=2),
    ]
    twins = [generate(prompt(64, seed=7), 4, sampling=sampling(seed=1, choice=i)) for i in range(2)]
    assert setup.run({0: mixed() + more + twins})


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: bool(t),
        lambda t: t[t > 0],
        lambda t: t.__setitem__(0, 1.0),
        lambda t: t.__setitem__(torch.tensor([0]), 1.0),
    ],
)
def test_the_guard_sees_what_waits(call):
    with NoWaitingMode(), pytest.raises(AssertionError, match="waits"):
        call(torch.ones(1))


def fail_when(monkeypatch, target, name, condition):
    """Out of memory in that call wherever the condition holds of its arguments."""
    original = getattr(target, name)
    calls = []

    def call(*args):
        if condition(*args):
            calls.append(args)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return original(*args)

    monkeypatch.setattr(target, name, call)
    return calls


@pytest.mark.parametrize("depth", [0, 1])
def test_out_of_memory_in_a_prompt_is_that_requests_error_and_no_one_elses(bench, monkeypatch, depth):
    setup = Setup(bench, slots=8, depth=depth, prefix_cache=True)
    calls = fail_when(
        monkeypatch,
        setup.runner._forward,
        "prefill",
        lambda pieces, slots: any(len(p) == 128 for p in pieces),
    )
    early, late = generate(prompt(9), 12), generate(prompt(10), 6)
    long, scored = generate(prompt(200, seed=1), 5), score(prompt(300, seed=2))
    outputs = setup.run({0: [early], 3: [long], 6: [scored], 9: [late]})
    failed = {f.request_id: f for o in outputs for f in o.failed}
    assert set(failed) == {long.request_id, scored.request_id} and len(calls) == 2
    for request_id, length in ((long.request_id, 200), (scored.request_id, 300)):
        assert failed[request_id].reason == "memory"
        assert f"no memory left for this request (a prompt of {length} tokens)" in failed[request_id].error
    assert not [s for o in outputs for s in o.scored]
    tokens = tokens_of(outputs)
    assert set(tokens) == {early.request_id, late.request_id}
    for m in (early, late):
        assert len(tokens[m.request_id]) == m.max_tokens
        bench.check_tokens(m, tokens[m.request_id])
    assert setup.device.released == 2
    assert setup.engine.idle and setup.engine.occupancy.used_slots == 0
    # Once there is memory again the same prompt is served, and from no state that the failure left behind.
    monkeypatch.undo()
    again = generate(prompt(200, seed=1), 5)
    outputs = run(setup.engine, {0: [again]})
    bench.check_tokens(again, tokens_of(outputs)[again.request_id])
    assert next(t for o in outputs for t in o.tokens).cached_tokens == 0


def test_choices_that_share_the_prompt_fail_with_it(bench, monkeypatch):
    setup = Setup(bench, slots=4)
    fail_when(monkeypatch, setup.runner._forward, "prefill", lambda pieces, slots: True)
    twins = [generate(prompt(60), 4, sampling=sampling(seed=1, choice=i)) for i in range(3)]
    outputs = setup.run({0: twins})
    assert {f.request_id for o in outputs for f in o.failed} == {t.request_id for t in twins}
    assert not [t for o in outputs for t in o.tokens] and setup.engine.occupancy.used_slots == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_out_of_memory_while_sampling_fails_the_batch_and_the_engine_goes_on(bench, monkeypatch, depth):
    setup = Setup(bench, slots=4, depth=depth)
    steps = []
    fail_when(monkeypatch, setup.runner._sampler, "sample", lambda *_: steps.append(0) or len(steps) == 4)
    batch = [generate(prompt(9, seed=i), 12) for i in range(2)]
    later = generate(prompt(30), 6)
    outputs = setup.run({0: batch, 8: [later]})
    assert {f.request_id for o in outputs for f in o.failed} == {m.request_id for m in batch}
    told = [t for o in outputs for t in o.tokens]
    assert all(t.finish_reason is None for t in told if t.request_id != later.request_id)
    for m in batch:  # what was told before was right; what was under way is lost
        ids = [t.token_id for t in told if t.request_id == m.request_id]
        assert len(ids) == 3 - depth
        bench.check_tokens(m, ids)
    ids = [t.token_id for t in told if t.request_id == later.request_id]
    assert len(ids) == 6
    bench.check_tokens(later, ids)
    assert setup.device.released == 1 and setup.engine.occupancy.used_slots == 0
