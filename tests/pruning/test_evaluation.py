"""Evaluation against hand computation, brute force, and models whose answers are known."""

import copy
import json
import math
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from checkpoints import GATED, random_tensors, write_checkpoint
from oracle import fla_logits
from recaller import write_recaller

from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.model import Model
from modeling.ops import RuleInputs, chunked_gated_delta_rule, reference_gated_delta_rule
from modeling.runtime import TorchRuntime
from pruning.calibration import Encoder, Text
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.evaluation import compare, evaluation_windows, perplexity, suite
from pruning.evaluation.recall import recall, recall_prompts
from pruning.evaluation.record import read_evaluation
from pruning.evaluation.speed import decode_speed
from pruning.evaluation.states import positions, rank, retrieval, utilisation
from pruning.evaluation.suite import EvaluationSettings, evaluate_checkpoints
from pruning.progress import no_progress
from pruning.reduction import Provenance, reduce_checkpoint
from pruning.selection import select

TEXT = Text("numbers", [" ".join(f"{i * i}" for i in range(n, n + 60)) for n in (0, 100, 200)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "dense", GATED))


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint.load()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "other", GATED, seed=1)).load()


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder(checkpoint)


def test_predictions_in_parts_are_those_of_whole_windows(model, other, encoder, monkeypatch):
    windows = evaluation_windows(encoder, TEXT, tokens=96, window=40, stride=12)
    whole = perplexity(model, windows, stride=12), *compare(model, other, windows, stride=12)
    seen = []
    logits = Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, h: (seen.append(len(h)), logits(self, h))[1])
    monkeypatch.setattr("pruning.evaluation.likelihood.LOGITS", 5 * 257 + 1)
    parts = perplexity(model, windows, stride=12), *compare(model, other, windows, stride=12)
    assert {*seen} == {5, 2}
    for a, b in zip(whole, parts, strict=True):
        assert a.as_json() == pytest.approx(b.as_json(), rel=1e-5)


def test_at_most_two_models_are_in_memory(tmp_path, checkpoint, monkeypatch):
    others = [open_checkpoint(write_checkpoint(tmp_path / str(n), GATED, seed=n)) for n in range(3)]
    loaded = []

    def load(self, **given):
        model = original(self, **given)
        loaded.append(weakref.ref(model))
        assert sum(ref() is not None for ref in loaded) <= 2
        return model

    original = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", load)
    settings = EvaluationSettings(TEXT, ("perplexity", "speed"), tokens=40, window=40)
    monkeypatch.setattr(suite, "decode_speed", partial(decode_speed, rounds=2, round_seconds=0.0))
    evaluation = evaluate_checkpoints([checkpoint, *others], settings, lambda *_: nullcontext(no_progress))
    assert len(evaluation.checkpoints) == len(loaded) == 4


def test_sliding_windows_score_each_token_once_with_the_promised_context(encoder):
    stream = [i for d in TEXT.documents for i in encoder(d)]
    windows = evaluation_windows(encoder, TEXT, tokens=96, window=40, stride=12)
    assert windows.shape == (8, 41)
    scored = windows[:, -12:].flatten().tolist()
    # 28 = window - stride tokens stand before the first scored one's own input.
    assert scored == stream[29 : 29 + 96]
    everything = evaluation_windows(encoder, TEXT, window=40, stride=12)
    assert everything.shape[0] == (len(stream) - 1 - 28) // 12


@pytest.mark.parametrize(("window", "stride"), [(40, 12), (40, 40), (7, 3), (1, 1)])
def test_sliding_perplexity_is_the_brute_force_over_every_token(checkpoint, model, encoder, window, stride):
    """Each token by itself, from a forward over the tokens of its window that stand before it."""
    stream = [i for d in TEXT.documents for i in encoder(d)]
    windows = evaluation_windows(encoder, TEXT, tokens=2 * stride, window=window, stride=stride)
    result = perplexity(model, windows, stride=stride)
    total = 0.0
    for i in range(2 * stride):
        target = window - stride + 1 + i
        context = torch.tensor([stream[(i // stride) * stride : target]])
        logits = fla_logits(random_tensors(GATED), GATED, context)[0, -1]
        total += float(F.cross_entropy(logits.double(), torch.tensor(stream[target])))
    assert result.loss == pytest.approx(total / (2 * stride), rel=1e-5)
    assert (result.tokens, result.window, result.stride) == (2 * stride, window, stride)


def test_kl_and_agreement_are_those_of_two_independent_forwards(checkpoint, model, other):
    windows = torch.randint(0, 257, (5, 34), generator=torch.Generator().manual_seed(0))
    steps = []
    result, divergence = compare(other, model, windows, stride=9, batch=2, advance=steps.append)
    log_p, log_q = (
        fla_logits(random_tensors(GATED, seed), GATED, windows[:, :-1]).double().log_softmax(-1)[:, -9:]
        for seed in (0, 1)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert divergence.kl == pytest.approx(float(kl), rel=1e-4)
    assert divergence.top1_agreement == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    )
    assert 0 < divergence.tokens == 45
    assert result == perplexity(other, windows, stride=9, batch=2)
    assert steps == [132, 132, 66]


def test_a_model_agrees_with_itself(model):
    windows = torch.randint(0, 257, (3, 65))
    _, divergence = compare(model, model, windows)
    assert (divergence.kl, divergence.top1_agreement, divergence.tokens) == (0.0, 1.0, 192)


def test_models_of_other_vocabularies_are_not_compared(model, tmp_path):
    path = write_checkpoint(tmp_path / "small", {**GATED, "vocab_size": 300})
    with pytest.raises(PruningError, match=r"vocab_size=300 is not the baseline's 257"):
        compare(open_checkpoint(path).load(), model, torch.zeros(1, 9, dtype=torch.long))


def test_recall_prompts_are_pairs_of_words_and_then_every_key_once(encoder):
    words = encoder.words()
    assert len(words) == 52  # the letters of the byte-level tokenizer
    prompts = recall_prompts(encoder, queries=40, seed=3)
    assert [p.pairs for p in prompts] == [4, 8, 16]  # 32 pairs need 64 words
    for p in prompts:
        assert p.ids.shape == (math.ceil(40 / p.pairs), 1 + 4 * p.pairs)
        assert (p.ids[:, 0] == 0).all()
        for row in p.ids[:, 1:].tolist():
            assert set(row) <= set(words)
            pairs = [tuple(row[i : i + 2]) for i in range(0, len(row), 2)]
            assert len(set(row)) == 2 * p.pairs  # no word twice
            assert sorted(pairs[: p.pairs]) == sorted(pairs[p.pairs :])
        assert p.ids[0, p.queries].sort().values.equal(p.ids[0, 1 : 1 + 2 * p.pairs : 2].sort().values)
    again, different = (
        recall_prompts(encoder, queries=40, seed=3),
        recall_prompts(encoder, queries=40, seed=4),
    )
    assert all(a.ids.equal(b.ids) for a, b in zip(prompts, again, strict=True))
    assert not prompts[0].ids.equal(different[0].ids)


def test_a_model_built_to_recall_recalls_everything_and_less_once_it_is_cut(tmp_path):
    dense = open_checkpoint(write_recaller(tmp_path / "recaller"))
    prompts = recall_prompts(Encoder(dense), queries=64)
    for result in recall(dense.load(), prompts):
        assert (result.accuracy, result.accuracy_among_values) == (1.0, 1.0)
        assert result.queries == 64
        assert -0.1 < result.log_prob < 0
    # A channel of this model is a word: without half of them it can't store half of the keys.
    selection = select(dense, CRITERIA["random"], [32])
    reduce_checkpoint(dense, selection, Provenance("random", 0), tmp_path / "reduced")
    for result in recall(open_checkpoint(tmp_path / "reduced").load(), prompts):
        assert 0.2 < result.accuracy < 0.8
        assert result.accuracy_among_values < 0.9


def test_a_model_that_knows_nothing_recalls_at_chance(checkpoint, encoder):
    model = checkpoint.load()
    model.lm_head.weight.mul_(1e-6)
    for result in recall(model, recall_prompts(encoder)):
        assert result.log_prob == pytest.approx(-math.log(257), rel=1e-4)
        assert result.accuracy < 0.05
        assert result.accuracy_among_values == pytest.approx(1 / result.pairs, abs=0.08)


def test_a_tokenizer_without_words_is_refused(encoder):
    with pytest.raises(PruningError, match="has 52 tokens that are plain words; 30 pairs need 60"):
        recall_prompts(encoder, pairs=[30, 40])


def test_utilisation_of_known_states():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q

    def state(*values):
        return left[:, : len(values)] @ torch.diag(torch.tensor(values).double()) @ right[: len(values)]

    states = torch.stack(
        [state(3.0, 3.0), state(2.0), state(*[1.0] * 8), state(2.0, 1.0), torch.zeros(8, 12)]
    )
    expected = [2 / 8, 1 / 8, 1.0, 1.25 / 8, 0.0]
    assert utilisation(states).tolist() == pytest.approx(expected)
    assert utilisation(states.mT).tolist() == pytest.approx(expected)


def states_by_token(model, windows):
    """What the rule of each layer is given, as float64 lists by layer: (q, k, v, g, beta)."""
    seen = []

    def rule(inputs):
        seen.append([x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)])
        return chunked_gated_delta_rule(inputs)

    with torch.no_grad():
        model(windows.flatten(), range(0, windows.numel() + 1, windows.shape[1]), rule=rule)
    return seen


def test_rank_along_the_sequence_is_that_of_the_states_with_decay(model):
    windows = torch.randint(0, 257, (3, 80), generator=torch.Generator().manual_seed(0))
    result = rank(model, windows, batch=2)
    assert result.positions == positions(80) == [32, 64, 80]
    assert result.windows == 3
    for layer, (q, k, v, g, beta) in enumerate(states_by_token(model, windows)):
        for p, at in enumerate(result.positions):
            expected = torch.zeros(4, dtype=torch.float64)
            for w in range(3):
                rows = slice(80 * w, 80 * w + at)
                _, state = reference_gated_delta_rule(
                    RuleInputs(q[rows], k[rows], v[rows], g[rows], beta[rows], scale=1.0, cu_seqlens=[0, at])
                )
                values = torch.linalg.svdvals(state[0])
                expected += (values.square().sum(-1) / values[:, 0].square()) / 24 / 3  # d_k 32, d_v 24
            assert result.utilisation[layer][p] == pytest.approx(expected.tolist(), rel=1e-4)


def test_reads_are_the_brute_force_over_every_token(model):
    windows = torch.randint(0, 257, (4, 48), generator=torch.Generator().manual_seed(0))
    result = retrieval(model, windows, noise=[0.0, 0.01, 0.5], batch=3)
    assert result.tokens == windows.numel()
    generator = torch.Generator().manual_seed(1)
    for layer, (q, k, v, g, beta) in enumerate(states_by_token(model, windows)):
        sines, changes = [], []
        for w in range(4):
            state = torch.zeros(1, 4, 32, 24).double()
            for t in range(48 * w, 48 * w + 48):
                _, state = reference_gated_delta_rule(
                    RuleInputs(
                        *(x[t : t + 1] for x in (q, k, v, g, beta)),
                        scale=1.0,
                        cu_seqlens=[0, 1],
                        initial_state=state,
                    )
                )
                key = k[48 * w : t].repeat_interleave(2, 1)  # by value head
                read = torch.einsum("hkv,thk->thv", state[0], key)
                cosine = F.cosine_similarity(read, v[48 * w : t], dim=-1)
                if len(key):
                    sines.append((1 - cosine.square()).sqrt().mean(0))
                query = q[t].repeat_interleave(2, 0)
                e = torch.randn(20, 4, 32, generator=generator, dtype=torch.float64) / 32**0.5
                noisy = F.normalize(query + 0.01 * e, dim=-1)
                clean = torch.einsum("hkv,hk->hv", state[0], query)
                change = torch.einsum("hkv,nhk->nhv", state[0], noisy) - clean
                changes.append(change.norm(dim=-1) / clean.norm(dim=-1))
        # One earlier association is read per token, at random: the mean over all is its expectation.
        assert result.retrieval_error[layer][0] == pytest.approx(
            torch.stack(sines).mean(0).tolist(), rel=0.05
        )
        # l2_normalise has an eps: a unit row is not one to the last digit.
        assert max(result.read_error[layer][0]) < 1e-5
        expected = torch.cat(changes).median(0).values
        assert result.read_error[layer][1] == pytest.approx(expected.tolist(), rel=0.3)
        assert sum(result.read_error[layer][1]) == pytest.approx(float(expected.sum()), rel=0.12)
        assert all(
            a > 10 * b for a, b in zip(result.read_error[layer][2], result.read_error[layer][1], strict=True)
        )


def test_states_that_are_not_finite_name_the_layer(model):
    broken = copy.deepcopy(model)
    broken.layers[1].mixer.A_log.fill_(float("nan"))
    windows = torch.zeros(1, 40, dtype=torch.long)
    with pytest.raises(PruningError, match="layer 1: the state after 32 tokens holds NaN or Inf"):
        rank(broken, windows)
    with pytest.raises(PruningError, match="layer 1: reads from the state hold NaN or Inf"):
        retrieval(broken, windows)
    with pytest.raises(PruningError, match="window=1 leaves nothing to retrieve"):
        retrieval(model, windows[:, :1])


def test_measuring_reads_does_not_change_the_model(model):
    windows = torch.randint(0, 257, (2, 33))
    before = perplexity(model, windows)
    retrieval(model, windows[:, :-1])
    assert perplexity(model, windows) == before


def test_speeds_are_medians_of_rounds_that_take_turns(model, other):
    """A clock that runs only while a model decodes: the second model takes half as long a step."""
    now, order = 0.0, []

    def timed(decode, seconds):
        def run(*args):
            nonlocal now
            now += seconds
            order.append(seconds)
            return decode(*args)

        return run

    runtimes = [TorchRuntime(model), TorchRuntime(other)]
    for runtime, seconds in zip(runtimes, (0.5, 0.25), strict=True):
        runtime.decode = timed(runtime.decode, seconds)
    first, second = decode_speed(runtimes, 3, rounds=4, round_seconds=1.0, clock=lambda: now)
    assert (first.steps, first.rounds, first.batch, first.back_end) == (2, 4, 3, "torch")
    assert (first.tokens_per_second, second.tokens_per_second) == (6.0, 12.0)
    assert (first.ratio, second.ratio, second.ratio_quartiles) == (1.0, 2.0, (2.0, 2.0))
    assert order[8:] == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5] * 2


def test_speed_is_measured_on_what_would_serve_and_nothing_else_is(checkpoint, monkeypatch):
    class Serving(TorchRuntime):
        name = "serving"

    loaded = []
    monkeypatch.setattr(suite, "compile_model", lambda model: loaded.append(model) or Serving(model))
    monkeypatch.setattr(suite, "decode_speed", partial(decode_speed, rounds=2, round_seconds=0.001))
    compared, compare = [], suite.compare
    monkeypatch.setattr(
        suite, "compare", lambda *models, **k: compared.append(models[:2]) or compare(*models, **k)
    )
    settings = EvaluationSettings(TEXT, parts=("perplexity", "speed"), tokens=64, window=32)
    found = evaluate_checkpoints([checkpoint] * 3, settings, lambda *_: nullcontext(no_progress))
    assert {speed.back_end for entry in found.checkpoints for speed in entry.speed} == {"serving"}
    assert all(isinstance(model, Model) for models in compared for model in models) and len(compared) == 2
    assert len({id(model) for model in loaded}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a file of lowkey-prune evaluate --json"),
        ('{"kind": "evaluation", "format": 1}', "missing required field `versions`"),
        (None, "No such file"),
    ],
)
def test_other_files_are_no_evaluations(tmp_path, content, message):
    file = tmp_path / "e.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PruningError, match=message):
        read_evaluation(file)


def test_evaluations_of_other_formats_are_refused(tmp_path):
    record = {
        "kind": "evaluation",
        "format": 2,
        "versions": {},
        "environment": {},
        "text": "",
        "text_sha256": "",
        "seed": 0,
        "checkpoints": [],
    }
    (tmp_path / "e.json").write_text(json.dumps(record))
    with pytest.raises(PruningError, match="is 'evaluation' of format 2; this version reads 'evaluation' of"):
        read_evaluation(tmp_path / "e.json")


def test_checkpoints_that_read_the_text_otherwise_are_refused(checkpoint, tmp_path):
    path = write_checkpoint(tmp_path / "swapped", GATED)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = EvaluationSettings(TEXT, tokens=64, window=32)
    with pytest.raises(PruningError, match="swapped reads the text as other tokens than"):
        evaluate_checkpoints(
            [checkpoint, open_checkpoint(path)], settings, lambda *_: nullcontext(no_progress)
        )
