"""Recall of identifiers of real text: what they score, and where the figures go."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from checkpoints import GATED, write_checkpoint

from modeling.checkpoint import open_checkpoint
from modeling.runtime import compile_model
from pruning.calibration import Encoder, Text
from pruning.errors import PruningError
from pruning.evaluation import likelihood
from pruning.evaluation.bits import BitsText, bits
from pruning.evaluation.identifiers import (
    IdentifierRecall,
    Identifiers,
    WordFigures,
    find_identifiers,
    identifier_recall,
    ranges,
)
from pruning.evaluation.likelihood import TokenScores, perplexity, token_scores
from pruning.evaluation.record import EvaluatedCheckpoint, Evaluation, read_evaluation
from pruning.evaluation.samples import Estimate, estimate_of_clusters
from pruning.evaluation.windows import evaluation_windows
from pruning.report.identifiers import identifiers as figure_of
from pruning.views import figures, legend

# In the tests' tokens, which are bytes, names come back after 72, "rare_name" after 273.
TEXT = Text("words", [" = ".join("rare_name" if n % 30 == 0 else f"item_{n % 8}" for n in range(100))] * 2)


@pytest.fixture(scope="module")
def checkpoint(dense):
    return open_checkpoint(dense)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint.load(dtype=torch.float64)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("other") / "other", GATED, seed=1)
    return open_checkpoint(path).load()


def greedy_windows(model, count, length):
    """Windows of what the model finds most likely, with other tokens strewn in."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 257, (count, 1), generator=generator)
    for at in range(length):
        log_p = torch.stack([by_prefix(model, row) for row in rows])
        random_ids = torch.randint(1, 257, (count,), generator=generator)
        chosen = torch.where(torch.arange(count) % 5 == at % 5, random_ids, log_p.argmax(-1))
        rows = torch.cat([rows, chosen[:, None]], 1)
    return rows


@torch.no_grad()
def by_prefix(model, prefix):
    """Log-probabilities of the token after a prefix, by a forward of the prefix alone."""
    hidden, _ = model(prefix, [0, len(prefix)])
    return model.logits(hidden[-1]).double().log_softmax(-1)


@pytest.mark.parametrize("stride", [None, 7])
def test_scores_are_those_of_one_forward_for_each_prefix(model, stride, monkeypatch):
    windows = greedy_windows(model, 3, 16)
    scores = token_scores(model, windows, stride=stride, batch=2)
    scored = stride or 16
    assert scores.log_prob.shape == scores.top1.shape == (3, scored)
    for row, log_probs, hits in zip(windows, scores.log_prob, scores.top1, strict=True):
        for i in range(scored):
            at = 16 - scored + i + 1
            log_p = by_prefix(model, row[:at])
            assert float(log_probs[i]) == pytest.approx(float(log_p[row[at]]), rel=1e-6)
            assert bool(hits[i]) == (int(log_p.argmax()) == int(row[at]))
    assert 0 < int(scores.top1.sum()) < scores.top1.numel()
    assert -float(scores.log_prob.mean()) == pytest.approx(
        perplexity(model, windows, stride=stride).loss, rel=1e-6
    )
    monkeypatch.setattr(likelihood, "LOGITS", 3 * 257)  # three tokens' logits at once
    parts, done = [], []
    parts = token_scores(model, windows, stride=stride, advance=done.append)
    assert parts.log_prob.allclose(scores.log_prob) and parts.top1.equal(scores.top1)
    assert sum(done) == 48


def test_a_broken_model_is_said(checkpoint):
    broken = checkpoint.load()
    broken.layers[1].mixer.A_log.fill_(float("nan"))
    with pytest.raises(PruningError, match="a log-probability is NaN or Inf"):
        token_scores(broken, torch.ones(2, 9, dtype=torch.int64))


def random_case(count=4, window=400, words=120, seed=0):
    """Identifiers at random places, and two models' scores."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 6, (words,), generator=generator)
    found = Identifiers(
        window,
        torch.randint(0, count, (words,), generator=generator),
        torch.randint(0, window - 6, (words,), generator=generator),
        tokens,
        torch.randint(64, window, (words,), generator=generator),
    )
    scores = [
        TokenScores(
            -torch.rand(count, window, generator=generator) * 4,
            torch.rand(count, window, generator=generator) < 0.8,
        )
        for _ in range(2)
    ]
    return found, *scores


def standard_error(values, clusters):
    """Square root of the variance of a mean, summed pair by pair over what is of one cluster."""
    count, mean = len(values), math.fsum(values) / len(values)
    covariance = math.fsum(
        (a - mean) * (b - mean)
        for a, i in zip(values, clusters, strict=True)
        for b, j in zip(values, clusters, strict=True)
        if i == j
    )
    groups = len(set(clusters))
    return math.sqrt(covariance * groups / (groups - 1)) / count


def test_figures_are_those_of_loops_over_the_identifiers():
    found, own, baseline = random_case()
    result = identifier_recall(found, own, baseline)
    assert [(r.begin, r.end) for r in result] == [(64, 256), (256, 400)]
    for recall in result:
        chosen = [
            i for i, distance in enumerate(found.distances.tolist()) if recall.begin <= distance < recall.end
        ]
        rows = [int(found.rows[i]) for i in chosen]
        assert recall.occurrences == len(chosen) and recall.windows == len(set(rows))
        values = {"log_prob": [], "exact": [], "first_token": []}
        for i in chosen:
            for scores, sign in ((own, 1), (baseline, -1)):
                at = range(int(found.columns[i]), int(found.columns[i] + found.tokens[i]))
                row = found.rows[i]
                values["log_prob"].append(sign * math.fsum(float(scores.log_prob[row, c]) for c in at))
                values["exact"].append(sign * all(bool(scores.top1[row, c]) for c in at))
                values["first_token"].append(sign * bool(scores.top1[row, at[0]]))
        for name, both in values.items():
            mine, lost = both[::2], [-(a + b) for a, b in zip(both[::2], both[1::2], strict=True)]
            for figures_of, expected in ((recall.figures, mine), (recall.drop, lost)):
                measured = getattr(figures_of, name)
                assert measured.mean == pytest.approx(math.fsum(expected) / len(expected), rel=1e-6, abs=1e-9)
                assert measured.standard_error == pytest.approx(standard_error(expected, rows), rel=1e-6)
    assert all(r.drop is None for r in identifier_recall(found, own))
    same = identifier_recall(found, own, own)
    assert all(r.drop.log_prob == Estimate(0.0, 0.0) for r in same)


def test_ranges_without_identifiers_and_single_windows():
    found, own, baseline = random_case(count=1, window=5000)
    near = replace(found, distances=found.distances.clamp(max=200))
    (recall,) = identifier_recall(near, own, baseline)
    assert (recall.begin, recall.end, recall.occurrences) == (64, 256, 120)
    assert recall.figures.exact.standard_error is None and recall.drop.log_prob.standard_error is None
    none = Identifiers(300, *torch.zeros(4, 0, dtype=torch.int64))
    assert identifier_recall(none, own) == []


def test_errors_of_clusters_are_the_plain_ones_where_samples_are_independent():
    samples = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = estimate_of_clusters(samples, torch.arange(50))
    assert alone.mean == pytest.approx(float(samples.mean()))
    assert alone.standard_error == pytest.approx(float(samples.std()) / math.sqrt(50))
    # Clusters of equal size are as good as their means.
    tens = estimate_of_clusters(samples, torch.arange(50) // 10 * 3)
    assert tens.standard_error == pytest.approx(float(samples.view(5, 10).mean(1).std()) / math.sqrt(5))
    # A sample that is there twice is no second one.
    twice = estimate_of_clusters(samples.repeat(2), torch.arange(50).repeat(2))
    assert twice.standard_error == pytest.approx(alone.standard_error)


def test_bits_measure_the_same_by_decode_steps(encoder, checkpoint, other):
    windows = evaluation_windows(encoder, TEXT, tokens=240, window=150, stride=120)
    found = find_identifiers(encoder, TEXT, windows, stride=120)
    text = BitsText(windows, 120, windows[:1, :9], [], found)
    models = [other, checkpoint.load()]
    own, baseline = (token_scores(m, windows, stride=120) for m in models)
    runtimes = [compile_model(m) for m in models]
    measured = bits(runtimes[0], runtimes[1], text)
    (expected,) = identifier_recall(found, own, baseline)
    for b in measured:
        (recall,) = b.identifiers
        assert (recall.begin, recall.end, recall.occurrences) == (64, 150, expected.occurrences)
        # Both are float32, summed in another order; narrower states part further.
        near = 1e-4 if b.state_dtype == "float32" else 0.05
        for name in ("log_prob", "exact", "first_token"):
            for mine, theirs in ((recall.figures, expected.figures), (recall.drop, expected.drop)):
                assert getattr(mine, name).mean == pytest.approx(getattr(theirs, name).mean, rel=near)
    assert measured[0].identifiers != measured[2].identifiers
    alone = bits(runtimes[1], None, text)
    assert alone[0].identifiers[0].drop is None and alone[1].identifiers[0].drop is not None
    assert bits(runtimes[1], None, replace(text, identifiers=None))[0].identifiers is None


def test_the_command_shows_and_writes_it(run, dense, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(TEXT.documents))
    run("prune", dense, "reduced", "--method", "l1", "--keep", 16)
    small = ("--text", "text.txt", "--tokens", 800, "--window", 400)
    parts = ("--part", "identifiers", "--part", "bits")
    output = run("evaluate", dense, "reduced", *parts, *small, "--json", "e.json")
    evaluation = read_evaluation(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(asdict(evaluation)))
    first, second = evaluation.checkpoints
    assert [(r.begin, r.end) for r in second.identifiers] == [(64, 256), (256, 400)]
    for a, b in zip(first.identifiers, second.identifiers, strict=True):
        assert a.drop is None and a.occurrences == b.occurrences > 0
        assert b.drop.log_prob.mean == pytest.approx(
            a.figures.log_prob.mean - b.figures.log_prob.mean, rel=1e-6
        )
    full = second.bits[0]
    for a, b in zip(second.identifiers, full.identifiers, strict=True):
        assert b.drop.log_prob.mean == pytest.approx(a.drop.log_prob.mean, rel=1e-2)
    assert "identifiers, 64 to 255 ago" in output and "drop, 256 to 399 ago" in output
    assert "int8: identifiers, 64 to 255 ago" in output

    encoder, text = Encoder(open_checkpoint(dense)), Text("text", ["\n".join(TEXT.documents)])
    windows = evaluation_windows(encoder, text, tokens=800, window=400)
    found = find_identifiers(encoder, text, windows)
    dense_scores, reduced_scores = (
        token_scores(open_checkpoint(path).load(), windows) for path in (dense, "reduced")
    )
    assert first.identifiers == identifier_recall(found, dense_scores)
    assert second.identifiers == identifier_recall(found, reduced_scores, dense_scores)

    record = json.loads((tmp_path / "e.json").read_text())
    for e in record["checkpoints"]:
        del e["identifiers"]
        for b in e["bits"]:
            del b["identifiers"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    old = read_evaluation(tmp_path / "old.json")
    assert [e.identifiers for e in old.checkpoints] == [None, None]
    assert old.checkpoints[0].bits[0].identifiers is None


def test_models_of_other_vocabularies_are_refused(run, dense, tmp_path):
    write_checkpoint(tmp_path / "small", {**GATED, "vocab_size": 300})
    (tmp_path / "text.txt").write_text(TEXT.documents[0])
    small = ("--text", "text.txt", "--tokens", 0, "--window", 200)
    output = run("evaluate", dense, "small", "--part", "identifiers", *small, code=2)
    assert "vocab_size=300 is not the baseline's 257" in output


def test_windows_without_identifiers_are_said_to_be_so(run, dense, tmp_path, caplog):
    (tmp_path / "text.txt").write_text(TEXT.documents[0])
    given = ("--text", "text.txt", "--tokens", 128, "--window", 64, "--json", "e.json")
    run("evaluate", dense, dense, "--part", "identifiers", *given)
    said = "identifiers are not measured: in 2 windows of 64 from text.txt none occurs again after 64 tokens or more"
    (record,) = caplog.records
    assert said in record.getMessage()
    assert [e.identifiers for e in read_evaluation(tmp_path / "e.json").checkpoints] == [[], []]


def measured_entry(name, shift):
    def figures_of(exact, error):
        return WordFigures(Estimate(-3 * exact, 0.1), Estimate(exact, error), Estimate(2 * exact, 0.04))

    recalls = [
        IdentifierRecall(
            begin,
            end,
            1200,
            30,
            figures_of(0.25 - shift - i / 16, 0.02 if i < 2 else None),
            figures_of(shift, 0.01 if i < 2 else None) if shift else None,
        )
        for i, (begin, end) in enumerate(ranges(2048))
    ]
    return EvaluatedCheckpoint(name, "ab" * 32, [32], 100, None, [0], identifiers=recalls)


@pytest.fixture
def evaluation():
    entries = [measured_entry("runs/dense", 0), measured_entry("runs/reduced", 0.03125)]
    return Evaluation("evaluation", 1, {}, {}, "some text", "", 0, entries)


def test_tables_hold_the_figures_with_their_errors(evaluation):
    rows = {label: [cell.text for cell in cells] for label, cells in figures(evaluation)}
    assert rows["identifiers, 64 to 255 ago"][0] == "25.0% ± 2.0 / 50.0% ± 4.0 / -0.75"
    assert rows["drop, 64 to 255 ago"] == ["", "+3.12 ± 1.00 / +6.25 ± 4.00 / -0.094 ± 0.100"]
    assert rows["drop, 1,024 to 2,047 ago"][1].startswith("+3.12 / ")
    assert "standard errors over windows" in legend(evaluation)
    bare = replace(evaluation, checkpoints=[replace(e, identifiers=None) for e in evaluation.checkpoints])
    assert legend(bare) == "" and not any("ago" in label for label, _ in figures(bare))


def test_the_figure_draws_shares_and_drops_by_distance(evaluation):
    (figure,) = figure_of("e", evaluation, 0)
    dense, dense_drop, reduced, reduced_drop = figure.figure.data
    assert list(dense.x) == [128, 512, pytest.approx(math.sqrt(1024 * 2048))]
    assert list(dense.y) == [25, 18.75, 12.5] and list(dense.error_y.array) == [2, 2, 0]
    assert list(dense_drop.x or ()) == [] and list(reduced_drop.y) == [3.125] * 3
    assert list(reduced_drop.error_y.array) == [1, 1, 0]
    assert reduced.name == reduced_drop.name == "runs/reduced"
    assert list(figure.figure.layout.xaxis.ticktext) == [
        "64<br>to 255",
        "256<br>to 1,023",
        "1,024<br>to 2,047",
    ]
    assert "1,200 of 64 to 255" in figure.caption and "some text" in figure.caption
    bare = replace(evaluation, checkpoints=[replace(e, identifiers=[]) for e in evaluation.checkpoints])
    assert figure_of("e", bare, 0) == []
