"""Calibration statistics: exact sums, no silent gaps, mergeable, one safe file."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

from modeling.checkpoint import open_checkpoint
from pruning.calibration import BATCH, Origin, take_shard, tokens_sha256
from pruning.collection import Collector, collect, zeros
from pruning.errors import PruningError
from pruning.gradients import GRADIENTS
from pruning.statistics import FORWARD, Statistics, load_statistics, merge, save_statistics

ORIGIN = Origin("test text", "0" * 64, seed=0, windows=6, window_length=40, tokens_sha256="a" * 64)


@pytest.fixture(params=[GATED, DELTA], ids=["gated", "delta"], scope="module")
def checkpoint(request, tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("s") / "c", request.param))


@pytest.fixture(scope="module")
def windows():
    return torch.randint(1, 257, (6, 40), generator=torch.Generator().manual_seed(0))


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_streamed_grams_are_those_of_all_rows_at_once(checkpoint, windows):
    model = checkpoint.load()
    seen = []

    def tap(layer, x, q, k):
        seen.append((x, q, k))
        return q, k

    with torch.no_grad():
        model(windows.flatten(), range(0, 241, 40), tap=tap)
    statistics = collect(model, windows, ORIGIN, checkpoint.sha256, batch=4)
    assert statistics.tokens == 240
    assert len(statistics.layers) == len(seen) == 3
    for grams, (x, q, k) in zip(statistics.layers.values(), seen, strict=True):
        assert set(grams) == set(FORWARD), "no gradients unless they are asked for"
        assert grams["x_squares"].dtype == torch.float64
        assert relative(grams["x_squares"], x.double().square().sum(0)) < 1e-5
        for name, raw in (("q", q), ("k", k)):
            raw = raw.double()
            unit = raw / (raw.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            for key, rows in ((name, raw), (f"{name}_normalised", unit)):
                assert grams[key].dtype == torch.float64
                # fp32 forwards of other batch sizes differ in the last bits.
                assert relative(grams[key], torch.einsum("thi,thj->hij", rows, rows)) < 1e-5
                assert grams[f"{key}_sum"].dtype == torch.float64
                assert relative(grams[f"{key}_sum"], rows.sum(0)) < 1e-5


def test_grams_are_summed_in_float64(checkpoint):
    # One loud token and many quiet ones that a float32 sum would swallow.
    collector = Collector(zeros(checkpoint.spec, FORWARD))
    m = checkpoint.spec.layers[0].mixer
    rows = torch.ones(1002, m.num_k_heads, m.d_k)
    rows[0] = 1e4
    q, k = collector.tap(0, torch.zeros(1002, 64), rows, rows)
    assert q is rows and k is rows, "what observes must not change the model"
    assert torch.all(collector.layers[0]["q"] == 1e8 + 1001)


def test_rows_are_normalised_with_the_model_s_eps(checkpoint):
    collector = Collector(zeros(checkpoint.spec, FORWARD))
    m = checkpoint.spec.layers[0].mixer
    faint = torch.zeros(3, m.num_k_heads, m.d_k)
    faint[0, :, 0] = 1e-3  # as large as the root of the eps: half its square is left
    collector.tap(0, torch.zeros(3, 64), faint, faint)
    for name in ("q_normalised", "k_normalised"):
        gram = collector.layers[0][name]
        assert torch.allclose(gram[:, 0, 0], torch.full((m.num_k_heads,), 0.5, dtype=torch.float64))
        assert float(gram.sum()) == pytest.approx(0.5 * m.num_k_heads)


def test_both_passes_start_every_document_from_an_empty_state(checkpoint):
    windows = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(5))
    windows[:, [0, 20]] = checkpoint.spec.eos_token_ids[0]
    model, seen = checkpoint.load(), []
    apart = collect(model, windows.view(4, 20), ORIGIN, checkpoint.sha256)
    forward = model.forward
    model.forward = lambda ids, offsets, *a, **k: seen.append(list(offsets)) or forward(ids, offsets, *a, **k)
    packed = collect(model, windows, ORIGIN, checkpoint.sha256, needed=GRADIENTS)
    assert seen == [[0, 20, 40, 60, 80], [0, 20, 40], [0, 20, 40]]
    for a, b in zip(packed.layers.values(), apart.layers.values(), strict=True):
        assert all(relative(a[name], b[name]) < 1e-6 for name in FORWARD)


def test_merged_shards_are_one_pass(checkpoint):
    windows = torch.randint(1, 257, (4 * BATCH + 3, 40), generator=torch.Generator().manual_seed(3))
    origin = replace(ORIGIN, windows=len(windows), tokens_sha256=tokens_sha256(windows))
    model = checkpoint.load()
    whole = collect(model, windows, origin, checkpoint.sha256, needed=GRADIENTS)
    shards = []
    for i in (3, 1, 2):
        rows, part = take_shard(windows, origin, i, 3)
        shards.append(collect(model, rows, part, checkpoint.sha256, needed=GRADIENTS))
    merged = merge(shards)
    assert merged.tokens == whole.tokens == windows.numel()
    assert [origin.shard for origin in merged.origins] == [f"{i}/3 of 19 windows" for i in (3, 1, 2)]
    for a, b in zip(merged.layers.values(), whole.layers.values(), strict=True):
        assert set(a) == {*FORWARD, *GRADIENTS}
        for name in a:
            assert relative(a[name], b[name]) < 1e-12


def test_merge_refuses_other_checkpoints_the_same_pass_twice_and_nothing(checkpoint, windows):
    statistics = collect(checkpoint.load(), windows, ORIGIN, checkpoint.sha256)
    other = Statistics("f" * 64, (Origin("x", "1" * 64, 0, 1, 1, "b" * 64),), statistics.layers)
    with pytest.raises(PruningError, match="different checkpoints"):
        merge([statistics, other])
    renamed = replace(statistics, origins=(replace(ORIGIN, text="the same tokens under another name"),))
    for again in (statistics, renamed):
        with pytest.raises(PruningError, match="same tokens are there twice"):
            merge([statistics, again])
    bare = Statistics(
        checkpoint.sha256,
        other.origins,
        {
            i: {name: layer[name] for name in layer if name != "x_squares"}
            for i, layer in statistics.layers.items()
        },
    )
    with pytest.raises(PruningError, match="different statistics: x_squares is not in all of them"):
        merge([statistics, bare])
    with pytest.raises(PruningError, match="no statistics"):
        merge([])


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ({}, {"windows": 12}, False),
        ({"shard": "1/2 of 12 windows"}, {"shard": "2/2 of 12 windows"}, True),
        ({"shard": "1/2 of 12 windows"}, {"shard": "2/3 of 12 windows"}, False),
        ({"shard": "1/2 of 12 windows"}, {"shard": "2/2 of 24 windows"}, False),
        ({"shard": "1/2 of 12 windows"}, {}, False),
        ({}, {"seed": 1}, True),
        ({}, {"text_sha256": "1" * 64}, True),
        ({}, {"window_length": 80}, True),
    ],
)
def test_draws_that_share_tokens_are_not_added_up(one, other, apart):
    layers = {0: {"x_squares": torch.zeros(2, dtype=torch.float64)}}
    parts = [
        Statistics("c" * 64, (replace(ORIGIN, tokens_sha256=digest * 64, **changes),), layers)
        for digest, changes in (("a", one), ("b", other))
    ]
    if apart:
        assert len(merge(parts).origins) == 2
    else:
        with pytest.raises(PruningError, match="the same tokens are there twice"):
            merge(parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k"])
def test_activations_that_are_not_finite_are_named(tmp_path, windows, name, value):
    tensors = random_tensors(GATED)
    tensors[f"model.layers.1.attn.{name}_proj.weight"][5, 7] = value
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", GATED, tensors))
    with pytest.raises(PruningError, match=rf"layer 1: {name} holds NaN or Inf"):
        collect(checkpoint.load(), windows, ORIGIN, checkpoint.sha256)


def test_a_layer_whose_tap_never_fires_fails(checkpoint, windows):
    model = checkpoint.load()
    mixer = model.layers[2].mixer
    forward = mixer.forward
    mixer.forward = lambda x, cu, state, *, rule, tap: forward(x, cu, state, rule=rule)
    with pytest.raises(PruningError, match="layer 2: the tap saw 0 of 160 tokens"):
        collect(model, windows, ORIGIN, checkpoint.sha256)


def test_progress_counts_every_token(checkpoint, windows):
    steps = []
    collect(checkpoint.load(), windows, ORIGIN, checkpoint.sha256, batch=4, advance=steps.append)
    assert steps == [160, 80]


@pytest.mark.parametrize("needed", [(), ("gate_fisher",)])
def test_file_brings_everything_back(checkpoint, windows, tmp_path, needed):
    statistics = collect(checkpoint.load(), windows, ORIGIN, checkpoint.sha256, needed=needed)
    file = tmp_path / "deep" / "s.safetensors"
    save_statistics(statistics, file)
    assert [p.name for p in file.parent.iterdir()] == ["s.safetensors"]
    assert file.stat().st_mode & 0o777 == 0o644
    back = load_statistics(file)
    assert (back.source_sha256, back.origins) == (statistics.source_sha256, statistics.origins)
    for a, b in zip(back.layers.values(), statistics.layers.values(), strict=True):
        assert set(a) == {*FORWARD, *needed}
        assert all(torch.equal(a[name], b[name]) for name in a)
    with safe_open(file, framework="pt") as f:
        record = json.loads(f.metadata()["lowkey_statistics"])
    assert record["origins"][0]["tokens"] == 240
    back.check_source(checkpoint)


def test_statistics_of_another_checkpoint_are_refused(checkpoint, windows, tmp_path):
    statistics = collect(checkpoint.load(), windows, ORIGIN, checkpoint.sha256)
    other = open_checkpoint(write_checkpoint(tmp_path / "c", dict(checkpoint.config), seed=9))
    with pytest.raises(PruningError, match=r"taken from a checkpoint with sha256 .* calibrate it again"):
        statistics.check_source(other)


def test_other_files_are_refused(tmp_path):
    missing, text, foreign, newer = (tmp_path / n for n in ("missing", "text", "foreign", "newer"))
    text.write_text("not safetensors")
    save_file({"a": torch.zeros(1)}, foreign)
    save_file({"a": torch.zeros(1)}, newer, metadata={"lowkey_statistics": json.dumps({"format": 1})})
    for file in (missing, text, foreign, newer):
        with pytest.raises(PruningError, match=file.name):
            load_statistics(file)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            torch.zeros(2, 4, 4, dtype=torch.float64),
            r"layer 1 of the statistics: k is torch.float64 \[2, 4, 4\]",
        ),
        (float("nan"), "layer 1 of the statistics: k is .* must be finite"),
        (torch.float32, "layer 1 of the statistics: k is torch.float32"),
        (None, "of 2 layers, not of 3"),
    ],
)
def test_a_file_whose_statistics_do_not_fit_the_checkpoint_is_refused(checkpoint, broken, message):
    layers = zeros(checkpoint.spec, FORWARD)
    if broken is None:
        del layers[2]
    elif isinstance(broken, torch.dtype):
        layers[1]["k"] = layers[1]["k"].to(broken)
    else:
        layers[1]["k"] = broken if isinstance(broken, torch.Tensor) else layers[1]["k"] + broken
    with pytest.raises(PruningError, match=message):
        Statistics(checkpoint.sha256, (ORIGIN,), layers).check_source(checkpoint)


@pytest.mark.parametrize("names", [[], ["q", "secret"], [["q"]], None])
def test_a_file_of_unknown_statistics_is_refused(tmp_path, names):
    record = {"format": 3, "names": names, "origins": [], "source_sha256": "", "unfinished": None}
    save_file({"a": torch.zeros(1)}, tmp_path / "s", metadata={"lowkey_statistics": json.dumps(record)})
    with pytest.raises(PruningError, match="statistics"):
        load_statistics(tmp_path / "s")
