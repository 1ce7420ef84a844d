"""States in fewer bits: what `evaluate --part bits` measures, against loops that share no code with it."""

import copy
import io
import json
import math
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from checkpoints import GATED, random_tensors, write_checkpoint
from recaller import write_recaller
from rich.console import Console

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime, compile_model
from modeling.spec import STATE_DTYPES, StateTypes
from pruning.calibration import Encoder, Text
from pruning.errors import PruningError
from pruning.evaluation import bits as module
from pruning.evaluation import suite
from pruning.evaluation.bits import Bits, BitsText, Drift, Octave, bits, octaves
from pruning.evaluation.likelihood import Divergence, Perplexity, perplexity
from pruning.evaluation.recall import Recall, recall, recall_prompts
from pruning.evaluation.record import EvaluatedCheckpoint, Evaluation, read_evaluation
from pruning.evaluation.samples import Estimate
from pruning.evaluation.suite import PARTS, EvaluationSettings, evaluate_checkpoints
from pruning.evaluation.windows import long_windows
from pruning.pareto import choices, pareto_table
from pruning.report.bits import drift, pareto
from pruning.views import figures, legend, pareto_view

TEXT = Text("numbers", [" ".join(f"{i * i}" for i in range(n, n + 60)) for n in (0, 100, 200)])
NEAR = 0.03
"""Scales are float32, whatever the rest is computed in, so one entry in 100,000 is rounded to the other side than in
the reference; the states then part a little for good."""


@pytest.fixture(scope="module")
def checkpoint(dense):
    return open_checkpoint(dense)


@pytest.fixture(scope="module")
def runtime(checkpoint):
    return compile_model(checkpoint.load())


@pytest.fixture(scope="module")
def exact(checkpoint):
    """In float64, so that next to nothing but the states is rounded."""
    return TorchRuntime(checkpoint.load(dtype=torch.float64))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("other") / "other", GATED, seed=1)
    return TorchRuntime(open_checkpoint(path).load(dtype=torch.float64))


@pytest.fixture(scope="module")
def prompts(checkpoint):
    return recall_prompts(Encoder(checkpoint), pairs=[4, 8], queries=16)


def windows_of(count, length, seed=0):
    return torch.randint(0, 257, (count, length + 1), generator=torch.Generator().manual_seed(seed))


def int8_columns(state):
    state = state.float().double()
    largest = state.abs().amax(-2, keepdim=True)
    return (state * 127 / largest).round() * largest / 127


ROUNDED = {"float32": lambda s: s.float(), "bfloat16": lambda s: s.bfloat16(), "int8": int8_columns}


def reference(dtype, windows, seed=0):
    """Log-probabilities `[count, length, vocab]` of the fla oracle, whose states, and the inputs that its convolutions
    remember, are rounded after every token."""

    def rule(q, k, v, beta, g):
        state, out = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3]), []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            u = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, :, None]).sum(-2))
            state = state + k[:, t, :, :, None] * u[:, :, None]
            out.append((state * q[:, t, :, :, None]).sum(-2) * q.shape[-1] ** -0.5)
            state = ROUNDED[dtype](state).double()
        return torch.stack(out, 1), state

    def conv(x, weight, bias):
        past = x if dtype == "float32" else x.bfloat16().double()
        y = F.conv1d(past.mT, weight, bias, padding=3, groups=len(weight))[..., : x.shape[1]].mT
        return F.silu(y + (x - past) * weight[:, 0, -1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "naive_recurrent_gated_delta_rule", rule)
        patch.setattr(oracle, "naive_gdn_gate", lambda a, a_log, bias: -a_log.exp() * F.softplus(a + bias))
        patch.setattr(oracle, "_conv", conv)
        tensors = {name: t.double() for name, t in random_tensors(GATED, seed).items()}
        return oracle.fla_logits(tensors, GATED, windows[:, :-1]).log_softmax(-1)


def losses(log_p, windows):
    return -log_p.gather(-1, windows[:, 1:, None])[..., 0]


def divergences(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def standard_error(samples):
    samples = samples.flatten()
    return float(((samples - samples.mean()).square().sum() / (len(samples) - 1) / len(samples)).sqrt())


@pytest.mark.parametrize("stride", [None, 20])
def test_figures_are_those_of_a_reference_that_rounds_after_every_token(exact, other, prompts, stride):
    windows = windows_of(5, 48)
    scored = slice(-(stride or 48), None)
    text = BitsText(windows, stride, windows_of(1, 8), prompts)
    found = bits(other, exact, text)
    alone = bits(exact, None, text)
    assert [b.state_dtype for b in found] == [b.state_dtype for b in alone] == list(STATE_DTYPES)
    baseline = reference("float32", windows)[:, scored]
    for seed, measured in ((0, alone), (1, found)):
        full = reference("float32", windows, seed)
        for b in measured:
            log_q = reference(b.state_dtype, windows, seed)
            by_window = losses(log_q, windows)[:, scored].mean(1)
            rise = by_window - losses(full, windows)[:, scored].mean(1)
            assert b.perplexity.loss == pytest.approx(float(by_window.mean()), rel=1e-5)
            assert b.perplexity.perplexity == pytest.approx(math.exp(b.perplexity.loss))
            assert (b.perplexity.tokens, b.perplexity.window) == (5 * (stride or 48), 48)
            assert b.perplexity.stride == (stride or 48)
            if b.state_dtype == "float32":
                assert b.loss_rise is None and (b.divergence is None) == (seed == 0)
            else:
                assert b.loss_rise.mean == pytest.approx(
                    float(rise.mean()), abs=NEAR * float(rise.abs().mean())
                )
                assert b.loss_rise.standard_error == pytest.approx(standard_error(rise), rel=NEAR)
            if b.divergence is not None:
                kl = float(divergences(baseline, log_q[:, scored]).mean())
                assert b.divergence.kl == pytest.approx(kl, rel=NEAR if seed == 0 else 1e-3)
                agreed = (baseline.argmax(-1) == log_q[:, scored].argmax(-1)).double().mean()
                assert b.divergence.top1_agreement == pytest.approx(float(agreed))


def test_float32_is_the_perplexity_of_the_chunked_forward(runtime, prompts):
    windows = windows_of(3, 100)
    (full, *_) = bits(runtime, None, BitsText(windows, 30, windows_of(1, 8), prompts))
    chunked = perplexity(runtime.model, windows, stride=30)
    assert full.perplexity.loss == pytest.approx(chunked.loss, rel=1e-5)
    for a, b in zip(full.recall, recall(runtime.model, prompts), strict=True):
        assert (a.pairs, a.queries) == (b.pairs, b.queries)
        assert a.log_prob == pytest.approx(b.log_prob, rel=1e-5)
        assert (a.accuracy, a.accuracy_among_values) == (b.accuracy, b.accuracy_among_values)


def test_bytes_are_those_of_a_server(runtime, prompts):
    spec = runtime.model.spec
    found = bits(runtime, None, BitsText(windows_of(2, 8), None, windows_of(1, 8), prompts))
    for b in found:
        assert b.state_bytes == spec.state_bytes(0, StateTypes.named(b.state_dtype, torch.float32))
        assert b.back_end == runtime.name
    state, conv, scales = 4 * 32 * 24, (2 * 2 * 32 + 4 * 24) * 3, 4 * 24
    assert [b.state_bytes for b in found] == [
        3 * (4 * state + 4 * conv),
        3 * (2 * state + 2 * conv),
        3 * (state + 2 * conv + 4 * scales),
    ]


def test_octaves_double_to_the_end_of_the_window():
    assert octaves(100) == [(0, 100)]
    assert octaves(512) == [(0, 512)]
    assert octaves(1300) == [(0, 512), (512, 1024), (1024, 1300)]
    assert octaves(32768)[-1] == (16384, 32768)


def test_drift_is_that_of_the_reference_by_position(exact, prompts, monkeypatch):
    monkeypatch.setattr(module, "FIRST_OCTAVE", 16)
    monkeypatch.setattr(module, "BLOCK", 4)
    long = windows_of(2, 40, seed=1)
    found = bits(exact, None, BitsText(windows_of(2, 8), None, long, prompts))
    full = reference("float32", long)
    for b in found:
        log_q = reference(b.state_dtype, long)
        assert (b.drift.windows, b.drift.window) == (2, 40)
        assert [(o.begin, o.end) for o in b.drift.octaves] == [(0, 16), (16, 32), (32, 40)]
        for octave in b.drift.octaves:
            at = slice(octave.begin, octave.end)
            assert octave.loss == pytest.approx(float(losses(log_q, long)[:, at].mean()), rel=1e-5)
            if b.state_dtype == "float32":
                assert octave.loss_rise is None and octave.kl is None
                continue
            rise = (losses(log_q, long) - losses(full, long))[:, at].unflatten(1, (-1, 4)).mean(-1)
            kl = divergences(full, log_q)[:, at].unflatten(1, (-1, 4)).mean(-1)
            assert octave.loss_rise.mean == pytest.approx(
                float(rise.mean()), abs=NEAR * float(rise.abs().mean())
            )
            assert octave.loss_rise.standard_error == pytest.approx(standard_error(rise), rel=NEAR)
            assert octave.kl.mean == pytest.approx(float(kl.mean()), rel=NEAR)
            assert octave.kl.standard_error == pytest.approx(standard_error(kl), rel=NEAR)


def test_what_memory_does_not_hold_together_is_read_in_parts(exact, other, prompts, monkeypatch):
    text = BitsText(windows_of(3, 12), 5, windows_of(2, 16), prompts)
    together, apart = [], []
    found = bits(other, exact, text, advance=together.append)
    monkeypatch.setattr(module, "MEMORY", 1)
    again = bits(other, exact, text, advance=apart.append)
    assert sum(together) == sum(apart) == text.tokens(alone=False) and len(together) < len(apart)
    for a, b in zip(found, again, strict=True):
        assert a.perplexity.loss == pytest.approx(b.perplexity.loss, rel=1e-6)
        assert a.divergence.kl == pytest.approx(b.divergence.kl, rel=1e-6)
        assert [r.queries for r in a.recall] == [r.queries for r in b.recall]
    alone = []
    bits(exact, None, text, advance=alone.append)
    assert sum(alone) == text.tokens(alone=True)


def test_one_window_has_no_standard_error(runtime, prompts):
    _, _, narrow = bits(runtime, None, BitsText(windows_of(1, 12), None, windows_of(1, 12), prompts))
    assert narrow.loss_rise.standard_error is None
    assert narrow.drift.octaves[0].kl.standard_error is None


def test_a_model_built_to_recall_does_so_in_every_dtype(tmp_path):
    dense = open_checkpoint(write_recaller(tmp_path / "recaller"))
    text = BitsText(
        windows_of(1, 8) % 64, None, windows_of(1, 8) % 64, recall_prompts(Encoder(dense), queries=32)
    )
    for b in bits(compile_model(dense.load()), None, text):
        assert {r.accuracy for r in b.recall} == {1.0}, b.state_dtype


def test_models_that_are_broken_or_of_other_vocabularies_are_refused(runtime, prompts, tmp_path):
    text = BitsText(windows_of(1, 8), None, windows_of(1, 8), prompts)
    broken = copy.deepcopy(runtime.model)
    broken.layers[1].mixer.A_log.fill_(float("nan"))
    with pytest.raises(PruningError, match="states in float32: the loss is NaN or Inf on this text"):
        bits(compile_model(broken), None, text)
    path = write_checkpoint(tmp_path / "small", {**GATED, "vocab_size": 300})
    with pytest.raises(PruningError, match=r"vocab_size=300 is not the baseline's 257"):
        bits(compile_model(open_checkpoint(path).load()), runtime, text)


def test_long_windows_are_as_long_as_the_text(checkpoint):
    encoder = Encoder(checkpoint)
    stream = [i for d in TEXT.documents for i in encoder(d)]
    whole = long_windows(encoder, TEXT, longest=10_000, block=64)
    length = (len(stream) - 1) // 64 * 64
    assert whole.tolist() == [stream[: length + 1]]
    cut = long_windows(encoder, TEXT, longest=128, block=64)
    assert cut.shape == ((len(stream) - 1) // 128, 129)
    assert cut[1].tolist() == stream[128:257]
    assert long_windows(encoder, TEXT, tokens=200, longest=10_000, block=64).tolist() == [stream[:193]]
    assert long_windows(encoder, TEXT, tokens=50, longest=10_000, block=64).shape == (1, 51)
    assert long_windows(encoder, TEXT, tokens=10**9, longest=10_000, block=64).equal(whole)
    with pytest.raises(PruningError, match="empty gives 1 token; at least 2 are needed"):
        long_windows(encoder, Text("empty", [""]), longest=128, block=64)


def test_the_suite_measures_all_and_says_how_far_it_is(checkpoint):
    shown = []

    @contextmanager
    def bar(description, total):
        done = []
        yield done.append
        shown.append((description, total, sum(done)))

    assert "bits" in PARTS
    settings = EvaluationSettings(TEXT, parts=("bits",), tokens=64, window=32, drift_window=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "recall_prompts", partial(recall_prompts, queries=16))
        found = evaluate_checkpoints([checkpoint] * 2, settings, bar)
    first, second = found.checkpoints
    assert [name for name, _, _ in shown] == [f"states in fewer bits of {checkpoint.source}"] * 2
    assert all(total == done for _, total, done in shown)
    assert shown[1][1] == shown[0][1] + 64  # the baseline with float32 states, beside it
    assert first.perplexity is None and first.recall is None
    assert {(b.drift.windows, b.drift.window) for b in first.bits} == {(1, 48)}
    for a, b in zip(first.bits, second.bits, strict=True):
        assert a == replace(b, divergence=a.divergence)
    assert second.bits[0].divergence == Divergence(0.0, 1.0, 64)
    assert first.bits[2].divergence == second.bits[2].divergence


def entry(name, figures, d_k=32):
    """A checkpoint with bits of (dtype, bytes, loss)."""
    measured = []
    for i, (dtype, size, loss) in enumerate(figures):
        rise = None if i == 0 else Estimate(loss - figures[0][2], 0.002)
        octave = Octave(0, 512, loss, rise, None if i == 0 else Estimate(0.004 * i, 0.0005))
        later = replace(octave, begin=512, end=1024, kl=None if i == 0 else Estimate(0.008 * i, None))
        measured.append(
            Bits(
                dtype,
                size,
                "cpu",
                Perplexity(loss, math.exp(loss), 1024, 512, 512),
                Divergence(0.01 * i, 0.9, 1024) if i or "dense" not in name else None,
                rise,
                [Recall(4, 8, 0.1, 0.5, -2.0), Recall(8, 8, 0.1, 0.25, -4.0)],
                Drift(2, 1024, [octave, later]),
            )
        )
    return EvaluatedCheckpoint(name, "ab" * 32, [d_k], figures[0][1], None, [0], bits=measured)


@pytest.fixture
def evaluation():
    dense = entry("runs/dense", [("float32", 800, 2.0), ("bfloat16", 400, 2.001), ("int8", 200, 2.01)])
    reduced = entry("runs/reduced", [("float32", 400, 2.001), ("bfloat16", 200, 2.02), ("int8", 100, 2.1)])
    return Evaluation("evaluation", 1, {}, {}, "text", "", 0, [dense, reduced])


def test_the_front_is_what_nothing_beats_in_bytes_and_perplexity(evaluation):
    found = choices(evaluation)
    assert [(c.entry.name[5:], c.bits.state_dtype, c.on_front) for c in found] == [
        ("reduced", "int8", True),
        ("dense", "int8", True),
        ("reduced", "bfloat16", False),
        ("dense", "bfloat16", True),  # as good as the next one in both
        ("reduced", "float32", True),
        ("dense", "float32", True),
    ]
    assert found[0].rise == pytest.approx(math.exp(0.1) - 1)


def test_tables_hold_the_figures_with_their_spread(evaluation):
    header, rows = pareto_table(evaluation)
    assert header[-1] == "front" and len(rows) == 6
    assert rows[1] == [
        "dense",
        "int8",
        "200",
        f"{math.exp(2.01):.3f}",
        "+1.01 %",
        "0.02000",
        "37.5%",
        "yes",
    ]
    assert rows[-1][5] == ""
    same = replace(evaluation.checkpoints[0], name="other/reduced")
    _, rows = pareto_table(replace(evaluation, checkpoints=[same, evaluation.checkpoints[1]]))
    assert {row[0] for row in rows} == {"other/reduced", "runs/reduced"}
    cells = {label: row[0].text for label, row in figures(evaluation)}
    assert cells["int8: bytes"] == "200"
    assert cells["int8: perplexity"] == f"{math.exp(2.01):.3f} (+1.005 % ± 0.202)"
    assert (cells["int8: KL"], cells["int8: recall"]) == ("0.020000", "37.5% / -3.00")
    assert cells["int8: drift to 512"] == "+10.00 ± 2.00 / 8.000 ± 0.500"
    assert cells["int8: drift to 1,024"] == "+10.00 ± 2.00 / 16.000"
    assert cells["float32: perplexity"] == f"{math.exp(2):.3f}"
    assert "Front:" not in legend(evaluation) and "standard errors" in legend(evaluation)


def test_the_table_of_bytes_is_whole_on_a_narrow_terminal(evaluation):
    console = Console(width=80, file=io.StringIO())
    console.print(pareto_view(evaluation))
    shown = console.file.getvalue()
    assert "…" not in shown and all(cell in shown for row in pareto_table(evaluation)[1] for cell in row[1:])


def test_evaluations_without_bits_have_neither_tables_nor_figures(evaluation):
    bare = replace(evaluation, checkpoints=[replace(e, bits=None) for e in evaluation.checkpoints])
    assert choices(bare) == [] and pareto_table(bare)[1] == [] and legend(bare) == ""
    assert not any("int8" in label for label, _ in figures(bare))
    assert pareto("e", bare, 0) == [] and drift("e", bare, 0) == []


def test_figures_are_drawn_from_the_measurements(evaluation):
    (figure,) = pareto("e", evaluation, 0)
    dense, dense_kl, reduced, reduced_kl, front, *dtypes = figure.figure.data
    assert (dense.name, reduced.name, front.name) == ("runs/dense", "runs/reduced", "front")
    assert list(reduced.x) == [100, 200, 400] and list(reduced.text) == ["int8", "bfloat16", "float32"]
    assert list(reduced.y) == pytest.approx([100 * math.expm1(loss) for loss in (0.1, 0.02, 0.001)])
    assert dense.y[-1] == 0.01  # a rise of nothing, on the lowest line
    assert list(dense_kl.y) == pytest.approx([0.02, 0.01]) and list(reduced_kl.y) == pytest.approx(
        [0.02, 0.01, 0]
    )
    assert list(front.x) == [100, 200, 400, 400, 800]
    symbols = {trace.name: trace.marker.symbol for trace in dtypes}
    assert [symbols[dtype] for dtype in reduced.text] == list(reduced.marker.symbol)
    assert len(set(symbols.values())) == 3
    assert list(figure.figure.layout.xaxis.tickvals) == [800, 400, 200, 100]
    (figure,) = drift("e", evaluation, 0)
    assert len(figure.figure.data) == 8
    rise, kl = (t for t in figure.figure.data[-2:])
    assert rise.name == kl.name == "runs/reduced" and (rise.yaxis, kl.yaxis) == ("y3", "y4")
    assert list(rise.x) == [512, 1024] and list(rise.y) == pytest.approx([0.099, 0.099])
    assert list(kl.y) == pytest.approx([0.008, 0.016]) and list(kl.error_y.array) == [0.0005, 0.0]
    assert list(figure.figure.layout.xaxis.ticktext) == ["512", "1k"]


def test_the_command_shows_and_writes_it(run, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "recall_prompts", partial(recall_prompts, queries=16))
    (tmp_path / "text.txt").write_text(TEXT.documents[0] * 3)
    small = ("--text", "text.txt", "--window", 64, "--tokens", 512)
    run("prune", dense, "reduced", "--method", "l1", "--keep", 16)
    output = run("evaluate", dense, "reduced", "--part", "bits", *small, "--json", "e.json")
    assert "Bytes against quality" in output and "int8: drift to 512" in output
    found = read_evaluation(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(asdict(found)))
    first, second = found.checkpoints
    assert [b.state_dtype for b in second.bits] == list(STATE_DTYPES)
    assert second.bits[0].state_bytes == second.state_bytes < first.state_bytes
    for choice in choices(found):
        assert f"{choice.bits.perplexity.perplexity:.3f}" in output
    record = json.loads((tmp_path / "e.json").read_text())
    for e in record["checkpoints"]:
        del e["bits"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert [e.bits for e in read_evaluation(tmp_path / "old.json").checkpoints] == [None, None]


def test_inspect_says_the_bytes_of_each_dtype(run, dense):
    made = run("prune", dense, "reduced", "--method", "l1", "--keep", 16)
    before = open_checkpoint(dense).spec
    after = open_checkpoint("reduced").spec
    for output in (made, run("inspect", "reduced")):
        for dtype in ("bfloat16", "int8"):
            types = StateTypes.named(dtype, torch.float32)
            was, now = before.state_bytes(0, types), after.state_bytes(0, types)
            change = 100 * (now / before.state_bytes(0) - 1)
            assert (
                f"in {dtype} {was:,} => {now:,} bytes ({change:.1f} % from {before.state_bytes(0):,})"
                in output
            )
    types = StateTypes.named("int8", torch.float32)
    assert f"in int8 {before.state_bytes(0, types):,} bytes (-" in run("inspect", dense)
