"""The engine's tokens are those of a plain loop over the model, whatever else runs and however steps overlap."""

import random

import pytest
import torch
from checkpoints import DELTA, GATED
from engines import GREEDY, Bench, generate, prompt, run, sampling, score, tokens_of

from modeling.checkpoint import open_checkpoint
from server.wire.messages import Abort, Sampling, unpack_top

CONFIGS = {
    "gated": GATED,  # two value heads to each key head
    "delta": DELTA,
    "per-layer": {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]},
}


@pytest.fixture(params=CONFIGS, scope="module")
def bench(request, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", CONFIGS[request.param])


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


LENGTHS = [1, 2, 3, 63, 64, 65, 127, 128, 129, 192, 256, 299, 300, *range(5, 100, 5)]


@pytest.mark.parametrize("depth", [0, 1])
def test_many_greedy_requests_are_the_plain_loop(bench, depth):
    messages = [generate(prompt(n, seed=n), max_tokens=1 + i % 12) for i, n in enumerate(LENGTHS)]
    assert len(messages) == 32
    outputs = run(bench.engine(slots=8, depth=depth), {0: messages})
    tokens = tokens_of(outputs)
    agreed = [bench.check_tokens(m, tokens[m.request_id]) for m in messages]
    assert [len(tokens[m.request_id]) for m in messages] == [m.max_tokens for m in messages]
    # Close calls are rare, so that this has compared nearly everything.
    assert sum(agreed) >= 0.9 * sum(m.max_tokens for m in messages)
    assert max(o.batch_size for o in outputs) == 8
    assert {o.phase for o in outputs} >= {"prefill", "decode", "mixed"}


@pytest.mark.parametrize("depth", [0, 1])
def test_sampled_tokens_are_the_plain_loops_alone_and_in_a_batch(bench, depth):
    messages = [
        generate(prompt(n, seed=n), max_tokens=10, sampling=sampling(seed=n - 5, temperature=0.5 + i / 10))
        for i, n in enumerate((1, 30, 64, 100, 150))
    ]
    together = tokens_of(run(bench.engine(slots=4, prefill_tokens=64, depth=depth), {0: messages}))
    for m in messages:
        alone = tokens_of(run(bench.engine(slots=1, prefill_tokens=512, depth=depth), {0: [m]}))
        for tokens in (alone, together):
            assert len(tokens[m.request_id]) == 10
            bench.check_tokens(m, tokens[m.request_id])


def test_tokens_do_not_depend_on_when_a_request_joins(bench):
    order = random.Random(0)
    messages = [
        generate(
            prompt(n, seed=n),
            max_tokens=6,
            sampling=GREEDY if i % 2 else sampling(seed=i),
        )
        for i, n in enumerate((1, 9, 70, 130, 64, 33, 200, 5))
    ]
    for _ in range(2):
        arrivals = {}
        for m in messages:
            arrivals.setdefault(order.randrange(12), []).append(m)
        tokens = tokens_of(run(bench.engine(slots=3, prefill_tokens=64, depth=order.randrange(2)), arrivals))
        for m in messages:
            bench.check_tokens(m, tokens[m.request_id])


def test_position_of_the_draw_is_the_index_of_the_token(gated):
    # A request that goes on from another's first tokens draws with other positions: its tokens may differ, but a
    # seed gives the same tokens again, and another seed or choice gives others.
    ids = prompt(20)
    runs = {
        key: tokens_of(run(gated.engine(), {0: [generate(ids, 24, sampling=how)]}))
        for key, how in {
            "a": sampling(seed=1),
            "again": sampling(seed=1),
            "seed": sampling(seed=2),
            "choice": sampling(seed=1, choice=1),
            "negative": sampling(seed=-(2**63)),
        }.items()
    }
    texts = {key: next(iter(tokens.values())) for key, tokens in runs.items()}
    assert texts["a"] == texts["again"]
    assert len({tuple(t) for t in texts.values()}) == 4


def test_filters_hold_in_the_engine(gated):
    ids = prompt(40)
    greedy = generate(ids, 12)
    narrow = [
        generate(ids, 12, sampling=Sampling(temperature=1.5, top_p=p, top_k=k, min_p=m, seed=3))
        for p, k, m in ((1e-9, 0, 0.0), (1.0, 1, 0.0), (1.0, 0, 1.0))
    ]
    tokens = tokens_of(run(gated.engine(slots=4), {0: [greedy, *narrow]}))
    for message in narrow:
        gated.check_tokens(greedy, tokens[message.request_id])


def test_a_stop_token_ends_the_request_and_is_its_last_token(gated):
    ids = prompt(30)
    plain = next(iter(tokens_of(run(gated.engine(), {0: [generate(ids, 20)]})).values()))
    stop = plain[7]
    at = plain.index(stop)
    for depth in (0, 1):
        message = generate(ids, 20, stop_token_ids=[stop, 300])
        outputs = run(gated.engine(depth=depth), {0: [message]})
        assert tokens_of(outputs)[message.request_id] == plain[: at + 1]
        assert outputs[-1].occupancy.used_slots == 0
        assert [t.finish_reason for o in outputs for t in o.tokens if t.finish_reason] == ["stop"]


def test_the_last_allowed_token_that_is_a_stop_token_is_a_stop(gated):
    ids = prompt(30)
    plain = next(iter(tokens_of(run(gated.engine(), {0: [generate(ids, 1)]})).values()))
    outputs = run(gated.engine(), {0: [generate(ids, 1, stop_token_ids=plain)]})
    assert [t.finish_reason for o in outputs for t in o.tokens] == ["stop"]


def test_a_slot_carries_nothing_over_to_its_next_request(gated):
    engine = gated.engine(slots=1)
    for n in (50, 3, 1, 64):
        message = generate(prompt(n, seed=n), 5)
        gated.check_tokens(message, tokens_of(run(engine, {0: [message]}))[message.request_id])


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
def test_abort_at_any_step_frees_the_slot_and_leaves_the_others_alone(gated, at, depth):
    victim, other, later = generate(prompt(150), 30), generate(prompt(9), 8), generate(prompt(20), 4)
    engine = gated.engine(slots=2, prefill_tokens=64, depth=depth)
    outputs = run(
        engine,
        {0: [victim, other, later], at: [Abort(request_id=victim.request_id)]}
        if at
        else {0: [victim, other, later, Abort(request_id=victim.request_id)]},
    )
    tokens = {}
    for output in outputs:
        for token in output.tokens:
            tokens.setdefault(token.request_id, []).append(token.token_id)
    assert len(tokens.get(victim.request_id, [])) < 30
    for m in (other, later):
        assert len(tokens[m.request_id]) == m.max_tokens
        gated.check_tokens(m, tokens[m.request_id])
    assert engine.idle
    assert outputs[-1].occupancy.used_slots == 0


def test_timings_come_with_the_first_token_only(gated):
    messages = [generate(prompt(10), 4), generate(prompt(10), 4)]
    outputs = run(gated.engine(slots=1), {0: messages})
    by_id = {}
    for output in outputs:
        for token in output.tokens:
            by_id.setdefault(token.request_id, []).append(token)
    first, second = (by_id[m.request_id] for m in messages)
    for tokens in (first, second):
        assert tokens[0].queue_s >= 0 and tokens[0].prefill_s > 0
        assert all(t.queue_s is None and t.prefill_s is None for t in tokens[1:])
    # The second waited for the whole of the first.
    assert second[0].queue_s > first[0].queue_s + first[0].prefill_s


def test_a_request_id_in_use_is_refused(gated):
    engine = gated.engine()
    message = generate(prompt(5), 3)
    engine.handle(message)
    with pytest.raises(ValueError, match="already in use"):
        engine.handle(message)
    engine.handle(Abort(request_id="unknown"))
    run(engine, {0: []})
    engine.handle(message)  # free again once it has ended
    assert tokens_of(run(engine, {0: []}))


def test_generate_and_score_share_steps(gated):
    ids = prompt(90)
    scored, generated = score(ids), generate(ids, 6)
    outputs = run(gated.engine(prefill_tokens=64), {0: [generated, scored]})
    gated.check_tokens(generated, tokens_of(outputs)[generated.request_id])
    (answer,) = (s for o in outputs for s in o.scored)
    assert answer.request_id == scored.request_id and len(answer.logprobs) == 89
    with torch.inference_mode():
        hidden, _ = gated.model(torch.tensor(ids), [0, 90])
        expected = gated.model.logits(hidden).log_softmax(-1)
    assert answer.logprobs == pytest.approx(
        [float(expected[i - 1, ids[i]]) for i in range(1, 90)], rel=1e-3, abs=1e-4
    )


def test_log_probabilities_are_those_of_one_float64_forward(gated):
    messages = [
        generate(prompt(70), 6, logprobs=4, sampling=sampling(seed=5, temperature=1.7)),
        generate(prompt(9), 6, logprobs=0, sampling=sampling(seed=5, logit_bias={7: 100.0})),
        generate(prompt(9), 6),
    ]
    answers = {}
    for output in run(gated.engine(slots=2, depth=1), {0: messages}):
        for token in output.tokens:
            answers.setdefault(token.request_id, []).append(token)
    exact = open_checkpoint(gated.checkpoint.path).load(dtype=torch.float64)
    for m in messages[:2]:
        tokens = answers[m.request_id]
        ids = m.token_ids + [t.token_id for t in tokens]
        with torch.inference_mode():
            hidden, _ = exact(torch.tensor(ids), [0, len(ids)])
            expected = exact.logits(hidden).log_softmax(-1)[len(m.token_ids) - 1 : -1]
        for t, row in zip(tokens, expected, strict=True):
            assert t.logprob == pytest.approx(float(row[t.token_id]), abs=1e-4)
            top = unpack_top(t.top)
            assert len(top) == m.logprobs
            values, ids = row.topk(m.logprobs)
            assert [x for _, x in top] == pytest.approx(values.tolist(), abs=1e-4)
            assert all(x == t.logprob for i, x in top if i == t.token_id)
    assert {t.token_id for t in answers[messages[1].request_id]} == {7}
    assert all(t.logprob is None and t.top is None for t in answers[messages[2].request_id])


@pytest.mark.parametrize("depth", [0, 1])
def test_no_stop_token_before_min_tokens(gated, depth):
    ids = prompt(30)
    plain = next(iter(tokens_of(run(gated.engine(), {0: [generate(ids, 20)]})).values()))
    stops = sorted(set(plain))
    for least in (1, 2, 5):
        message = generate(ids, 20, stop_token_ids=stops, min_tokens=least)
        tokens = tokens_of(run(gated.engine(depth=depth), {0: [message]}))[message.request_id]
        assert not set(tokens[:least]) & set(stops)
        assert len(tokens) == 20 or (len(tokens) > least and tokens[-1] in stops)


def test_a_bfloat16_state_is_close_and_half_the_memory(gated):
    message = score(prompt(100))
    (full,), (half,) = (
        [s for o in run(gated.engine(state_dtype=d, prefill_tokens=64), {0: [message]}) for s in o.scored]
        for d in ("float32", "bfloat16")
    )
    assert half.logprobs[:63] == pytest.approx(full.logprobs[:63], abs=1e-4)  # before the first rounding
    assert half.logprobs[63:] == pytest.approx(full.logprobs[63:], abs=0.1)
    assert half.logprobs != full.logprobs
