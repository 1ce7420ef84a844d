"""In batch_invariant mode a request's numbers are the same bits, whatever else runs and whatever is cached."""

import pytest
from checkpoints import DELTA, GATED
from engines import Bench, generate, prompt, run, sampling, score


@pytest.fixture(params=[GATED, DELTA], ids=["gated", "delta"], scope="module")
def bench(request, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", request.param)


@pytest.fixture(params=["float32", "int8"])
def state_dtype(request):
    """In int8 a state is rounded wherever its prompt is cut."""
    return request.param


def numbers(outputs):
    """Each request's tokens with all that was reported about them."""
    result = {}
    for output in outputs:
        for t in output.tokens:
            result.setdefault(t.request_id, []).append((t.token_id, t.logprob, t.top))
        for s in output.scored:
            result[s.request_id] = (s.logprobs, s.top)
    return result


def messages():
    lengths = (1, 40, 63, 64, 65, 128, 129, 200, 255, 300, 17, 90, 3, 64, 191, 192, 193, 70, 31, 8)
    result = [
        generate(
            prompt(n, seed=n % 3),  # some begin alike
            24,
            logprobs=7,
            sampling=sampling(seed=n, temperature=0.0 if i % 2 else 1.3, presence_penalty=0.5 * (i % 3)),
        )
        for i, n in enumerate(lengths)
    ]
    return [*result, score(prompt(170), 1, top_logprobs=2), score(prompt(230), 150, top_logprobs=3)]


def test_alone_in_a_batch_and_from_the_cache_are_the_same_bits(bench, state_dtype):
    everything = messages()
    options = dict(batch_invariant=True, state_dtype=state_dtype)
    alone = {}
    for m in everything:
        alone |= numbers(run(bench.engine(slots=1, prefill_tokens=512, **options), {0: [m]}))
    for slots, prefill_tokens, depth, prefix_cache in (
        (30, 128, 0, True),
        (5, 64, 1, False),
    ):
        engine = bench.engine(
            slots=slots, prefill_tokens=prefill_tokens, depth=depth, prefix_cache=prefix_cache, **options
        )
        arrivals = {}
        for i, m in enumerate(everything):
            arrivals.setdefault(i // 8, []).append(m)
        together = run(engine, arrivals)
        assert numbers(together) == alone
        assert max(o.batch_size for o in together) >= min(slots, 17)  # more than one group
        assert (sum(o.cache_hits for o in together) > 0) == prefix_cache
        # and once more, with all of it in the cache
        assert numbers(run(engine, {0: everything})) == alone


def test_it_is_needed(bench):
    """Without it some last bits differ: else the test above could not fail."""
    everything = messages()
    alone = {}
    for m in everything:
        alone |= numbers(run(bench.engine(slots=1, prefill_tokens=512), {0: [m]}))
    together = numbers(run(bench.engine(slots=30, prefill_tokens=128), {0: everything}))
    assert together != alone
