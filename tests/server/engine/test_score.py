"""Scores are the log-softmax of the one-shot forward; KL against another engine is the sum over the whole
vocabulary."""

import pytest
import torch
from checkpoints import DELTA, GATED
from engines import Bench, generate, prompt, run, score, tokens_of

from modeling.checkpoint import open_checkpoint
from server.wire.messages import Abort, KLReference, unpack_top

CONFIGS = {
    "gated": GATED,
    "delta": DELTA,
    "per-layer": {**GATED, "head_dim": [32, 8, 20], "expand_v": [0.75, 3.0, 1.2]},
}


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    root = tmp_path_factory.mktemp("m")
    return {name: Bench(root / name, config, seed=i) for i, (name, config) in enumerate(CONFIGS.items())}


@pytest.fixture(scope="module")
def exact(benches):
    """Log-probabilities `[tokens, vocab]` in float64 by one forward."""
    models = {
        name: open_checkpoint(b.checkpoint.path).load(dtype=torch.float64) for name, b in benches.items()
    }

    @torch.inference_mode()
    def logprobs(name, ids):
        hidden, _ = models[name](torch.tensor(ids), [0, len(ids)])
        return models[name].logits(hidden).log_softmax(-1)

    return logprobs


def scored(engine, message):
    (answer,) = (s for o in run(engine, {0: [message]}) for s in o.scored)
    assert answer.request_id == message.request_id
    return answer


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_log_softmax_of_one_forward(benches, exact, name):
    ids = prompt(200)
    expected = exact(name, ids)
    expected = [float(expected[i - 1, ids[i]]) for i in range(1, 200)]
    for first, budget in [(1, 512), (1, 64), (2, 64), (63, 64), (64, 64), (65, 64), (66, 128), (199, 64)]:
        answer = scored(benches[name].engine(prefill_tokens=budget), score(ids, first))
        assert answer.logprobs == pytest.approx(expected[first - 1 :], abs=1e-4)
        assert answer.kl == [] and answer.agree == []


def test_nothing_to_score_is_an_empty_answer(benches):
    engine = benches["gated"].engine()
    assert scored(engine, score(prompt(1))).logprobs == []
    assert scored(engine, score(prompt(70), 70)).logprobs == []
    assert engine.idle and engine.occupancy.used_slots == 0


def compare(benches, path, ids, first, reference_first, *, names=("gated", "delta"), budgets=(512, 512)):
    """The answer of the second engine, held against the first through the file."""
    vocab = benches[names[0]].model.spec.vocab_size
    with path.open("xb") as f:
        f.truncate((len(ids) - reference_first) * vocab * 4)
    answers = [
        scored(
            benches[name].engine(prefill_tokens=budget),
            score(
                ids, first, kl_reference=KLReference(path=str(path), mode=mode, from_position=reference_first)
            ),
        )
        for name, mode, budget in zip(names, ("write", "compare"), budgets, strict=True)
    ]
    assert answers[0].kl == [] and answers[0].agree == []
    return answers[1]


@pytest.mark.parametrize(
    ("length", "first", "reference_first", "budgets"),
    [
        (40, 1, 1, (512, 512)),
        (40, 1, 25, (512, 512)),
        (40, 25, 25, (512, 512)),
        (200, 1, 1, (512, 64)),
        (200, 1, 100, (64, 128)),
        (200, 1, 65, (64, 512)),
        (200, 1, 64, (128, 64)),
        (200, 60, 130, (64, 64)),
        (200, 1, 199, (64, 64)),
    ],
)
def test_kl_is_the_sum_over_the_vocabulary(benches, exact, tmp_path, length, first, reference_first, budgets):
    ids = prompt(length, seed=5)
    answer = compare(benches, tmp_path / "x", ids, first, reference_first, budgets=budgets)
    p, q = (exact(name, ids)[reference_first - 1 : length - 1] for name in ("gated", "delta"))
    expected = (p.exp() * (p - q)).sum(-1)
    assert expected.min() > 0.01
    assert answer.kl == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    assert answer.agree == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert len(answer.logprobs) == length - first


def test_a_model_against_itself_has_no_kl_and_agrees(benches, tmp_path):
    answer = compare(
        benches, tmp_path / "x", prompt(150), 1, 20, names=("per-layer", "per-layer"), budgets=(512, 64)
    )
    assert answer.kl == pytest.approx([0.0] * 130, abs=1e-6)
    assert answer.agree == [True] * 130


def test_agreement_is_seen_where_there_is_some(benches, exact, tmp_path):
    # Near copies: most tokens agree, some do not.
    ids = prompt(200, seed=9)
    bench = benches["gated"]
    near = open_checkpoint(bench.checkpoint.path).load()
    near.lm_head.weight.data += (
        torch.randn(near.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.03
    )
    original, bench.model = bench.model, near
    try:
        answer = compare(benches, tmp_path / "x", ids, 1, 1, names=("delta", "gated"))
        with torch.inference_mode():
            hidden, _ = near(torch.tensor(ids), [0, 200])
            q = near.logits(hidden)[:-1].argmax(-1)
        assert answer.agree == (exact("delta", ids)[:-1].argmax(-1) == q).tolist()
    finally:
        bench.model = original


def test_references_of_several_requests_in_one_step_do_not_mix(benches, exact, tmp_path):
    prompts = {tmp_path / str(n): prompt(n, seed=n) for n in (30, 90, 150)}
    for path, ids in prompts.items():
        path.write_bytes(bytes((len(ids) - 1) * 257 * 4))
    for name, mode in (("delta", "write"), ("gated", "compare")):
        messages = [
            score(ids, kl_reference=KLReference(path=str(path), mode=mode, from_position=1))
            for path, ids in prompts.items()
        ]
        answers = {s.request_id: s for o in run(benches[name].engine(), {0: messages}) for s in o.scored}
    for message in messages:
        p, q = (exact(name, message.token_ids)[:-1] for name in ("delta", "gated"))
        assert answers[message.request_id].kl == pytest.approx(
            (p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize("mode", ["write", "compare"])
def test_a_reference_that_is_gone_costs_that_request_only(benches, tmp_path, mode):
    # The client left: the API has removed the file, and the abort is on its way.
    path = tmp_path / "gone"
    lost = score(prompt(150), kl_reference=KLReference(path=str(path), mode=mode, from_position=10))
    other = generate(prompt(20), 4)
    engine = benches["gated"].engine(prefill_tokens=64)
    outputs = run(engine, {0: [lost, other], 2: [Abort(request_id=lost.request_id)]})
    assert len(tokens_of(outputs)[other.request_id]) == 4
    assert engine.idle and engine.occupancy.used_slots == 0
    assert not path.exists(), "shared memory that nobody would ever remove"


def test_the_most_likely_tokens_of_each_position(benches, exact):
    ids = prompt(150)
    expected = exact("gated", ids)
    for first, k in ((1, 3), (100, 1), (140, 300)):
        answer = scored(benches["gated"].engine(prefill_tokens=64), score(ids, first, top_logprobs=k))
        assert len(answer.top) == len(answer.logprobs) == 150 - first
        for position, top in enumerate(map(unpack_top, answer.top), first):
            values = expected[position - 1].topk(min(k, 257)).values.tolist()
            assert [x for _, x in top] == pytest.approx(values, abs=1e-4)
            assert all(x == answer.logprobs[position - first] for i, x in top if i == ids[position])
    assert scored(benches["gated"].engine(), score(ids)).top == []
