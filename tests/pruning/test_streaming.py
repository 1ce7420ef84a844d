"""Calibration with one layer in memory at a time, against the whole model's."""

import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from hybrids import CASES, write_hybrid
from pruning_runs import TEXT, invoke

import pruning.memory
from modeling.checkpoint import open_checkpoint, write_safetensors
from pruning.calibration import Origin, tokens_sha256
from pruning.collection import Collector, collect
from pruning.errors import PruningError
from pruning.statistics import FORWARD, Statistics, load_hidden, load_unfinished, save_statistics
from pruning.streaming import collect_streaming, layers_to_run

WINDOWS = torch.randint(0, 257, (10, 40), generator=torch.Generator().manual_seed(0))
ORIGIN = Origin("t", "0" * 64, 0, 10, 40, tokens_sha256(WINDOWS))

HYBRIDS = {
    **{
        name: CASES[name]
        for name in ("vl-dense-bf16", "vl-moe-fused", "vl-moe-each", "next-some-dense", "olmo")
    },
    "experts in bf16": replace(CASES["vl-moe-fused-tied-odd"], dtype=torch.bfloat16),
    "each expert in bf16": replace(CASES["next"], dtype=torch.bfloat16),
}


def opened(path, kind):
    if kind in HYBRIDS:
        return open_checkpoint(write_hybrid(path, HYBRIDS[kind]))
    return open_checkpoint(write_checkpoint(path, {"gated": GATED, "delta": DELTA}[kind]))


def same_bits(a, b):
    assert (a.origins, a.names, a.source_sha256) == (b.origins, b.names, b.source_sha256)
    assert list(a.layers) == list(b.layers)
    for x, y in zip(a.layers.values(), b.layers.values(), strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("kind", ["gated", "delta", *HYBRIDS])
def test_statistics_are_those_of_the_whole_model_to_the_last_bit(tmp_path, kind):
    checkpoint = opened(tmp_path / "c", kind)
    steps = []
    streamed = collect_streaming(checkpoint, WINDOWS, ORIGIN, advance=steps.append)
    same_bits(streamed, collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256))
    assert sum(steps) == WINDOWS.numel() * layers_to_run(checkpoint.spec)


def test_layers_behind_the_last_linear_one_are_not_run(tmp_path):
    checkpoint = opened(tmp_path / "c", "vl-moe-fused")
    assert (len(checkpoint.spec.layers), layers_to_run(checkpoint.spec)) == (8, 7)


def test_experts_stay_as_they_are_stored_and_the_widest_of_them_counts(tmp_path):
    fused = opened(tmp_path / "fused", "experts in bf16").block(0)
    assert fused.ffn.in_proj.dtype == fused.ffn.out_proj.dtype == torch.bfloat16
    assert {
        p.dtype for name, p in fused.named_parameters() if name not in ("ffn.in_proj", "ffn.out_proj")
    } == {torch.float32}
    path = write_hybrid(tmp_path / "each", HYBRIDS["each expert in bf16"])
    narrow = open_checkpoint(path)
    tensors = {name: narrow.tensor(name).clone() for name in narrow.files}
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].float() * (1 + 2**-20)
    (path / "model.safetensors").unlink()
    write_safetensors(path, tensors.items())
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.block(0).ffn.in_proj, checkpoint.load().blocks[0].ffn.in_proj)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("c") / "c", "gated")


class InterruptedHereError(Exception):
    pass


def interrupt_after(calls):
    steps = []

    def advance(tokens):
        steps.append(tokens)
        if len(steps) > calls:
            raise InterruptedHereError

    return advance


# 3 layers, each in 3 batches of 4, 4 and 2 windows.
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 6, 8])
def test_an_interrupted_one_goes_on_to_the_same_bits(checkpoint, tmp_path, calls):
    partial = tmp_path / "s.partial"
    with pytest.raises(InterruptedHereError):
        collect_streaming(
            checkpoint, WINDOWS, ORIGIN, partial=partial, save_every=0.0, advance=interrupt_after(calls)
        )
    _, done = load_unfinished(partial)
    layer, batches = divmod(calls - 1, 3)
    assert done == {"layer": layer, "forward": min(4 * (batches + 1), 10), "batch": 4}
    assert load_hidden(partial, (WINDOWS.numel(), 64)).isfinite().all()
    steps = []
    resumed = collect_streaming(checkpoint, WINDOWS, ORIGIN, partial=partial, advance=steps.append)
    assert steps[0] == 400 * layer + 40 * done["forward"], "what was done is not done again"
    assert sum(steps) == 3 * WINDOWS.numel()
    same_bits(resumed, collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256))


def test_what_is_left_of_the_other_way_is_refused(checkpoint, tmp_path):
    refused = "differs in whether one layer is in memory at a time; .* --overwrite"
    partial = tmp_path / "s.partial"
    options = {"partial": partial, "save_every": 0.0, "advance": interrupt_after(2)}
    with pytest.raises(InterruptedHereError):
        collect_streaming(checkpoint, WINDOWS, ORIGIN, **options)
    with pytest.raises(PruningError, match=refused):
        collect(checkpoint.load(), WINDOWS, ORIGIN, checkpoint.sha256, partial=partial)
    partial.unlink()
    with pytest.raises(InterruptedHereError):
        collect(
            checkpoint.load(),
            WINDOWS,
            ORIGIN,
            checkpoint.sha256,
            **{**options, "advance": interrupt_after(2)},
        )
    with pytest.raises(PruningError, match=refused):
        collect_streaming(checkpoint, WINDOWS, ORIGIN, partial=partial)
    running, done = load_unfinished(partial)
    save_statistics(
        running, partial, unfinished={"layer": 0, "forward": done["forward"], "batch": done["batch"]}
    )
    with pytest.raises(PruningError, match="holds no hidden states to go on from"):
        collect_streaming(checkpoint, WINDOWS, ORIGIN, partial=partial)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer": -1}, "layer=-1 must be a whole number from 0 to 3"),
        ({"layer": 4}, "layer=4 must be a whole number from 0 to 3"),
        ({"layer": 1.0}, "layer=1.0 must be a whole number"),
        ({"layer": True}, "layer=True must be a whole number"),
        ({"forward": 12}, "forward=12 must be a whole number from 0 to 10"),
        ({"forward": 3}, "forward=3 is not whole batches of 4"),
        ({"batch": 0}, "batch=0 must be a whole number from 1"),
        ({"more": 1}, "unfinished has the keys"),
        ({"forward": None}, "forward=None must be a whole number"),
        ({"hidden": torch.zeros(400, 63)}, r"float32 \[400, 63\], not torch.float32 \[400, 64\]"),
        ({"hidden": torch.zeros(360, 64)}, r"float32 \[360, 64\], not torch.float32 \[400, 64\]"),
        ({"hidden": torch.zeros(400, 64).half()}, r"float16 \[400, 64\]"),
    ],
    ids=str,
)
def test_what_is_damaged_is_refused(checkpoint, tmp_path, change, said):
    partial = tmp_path / "s.partial"
    with pytest.raises(InterruptedHereError):
        collect_streaming(
            checkpoint, WINDOWS, ORIGIN, partial=partial, save_every=0.0, advance=interrupt_after(2)
        )
    running, done = load_unfinished(partial)
    hidden = change.get("hidden", torch.zeros(400, 64))
    changed = {key: value for key, value in change.items() if key != "hidden"}
    save_statistics(running, partial, unfinished={**done, **changed}, hidden=hidden)
    with pytest.raises(PruningError, match=f"{partial.name} .*{said}"):
        collect_streaming(checkpoint, WINDOWS, ORIGIN, partial=partial)


def test_activations_that_are_not_finite_name_the_layer(tmp_path):
    path = write_checkpoint(tmp_path / "c", GATED)
    checkpoint = open_checkpoint(path)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.files}
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    (path / "model.safetensors").unlink()
    write_safetensors(path, tensors.items())
    with pytest.raises(PruningError, match="layer 2: x holds NaN or Inf"):
        collect_streaming(open_checkpoint(path), WINDOWS, ORIGIN)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    return ("--text", tmp_path / "text", *TEXT)


def with_memory(monkeypatch, size):
    monkeypatch.setattr(pruning.memory, "host_memory", lambda: size)


def test_it_is_chosen_where_the_model_does_not_fit_and_gives_the_same_file(
    checkpoint, text, tmp_path, monkeypatch
):
    def calibrated(name, *more):
        result = invoke("calibrate", checkpoint.path, tmp_path / name, *text, *more)
        assert result.exit_code == 0, result.output
        return "forward, one layer at a time" in result.stderr, (tmp_path / name).read_bytes()

    streamed, whole = calibrated("whole")
    assert not streamed
    assert calibrated("forced", "--stream-layers") == (True, whole)
    spec = checkpoint.spec
    takes = pruning.memory.whole_memory(spec, pruning.memory.FORWARD, 64).total
    needs = pruning.memory.streaming_memory(checkpoint, 4, 64).total
    assert needs < takes
    with_memory(monkeypatch, takes - 1)
    assert calibrated("chosen") == (True, whole)
    with_memory(monkeypatch, takes)
    assert calibrated("fits") == (False, whole)
    with_memory(monkeypatch, needs - 1)
    result = invoke("calibrate", checkpoint.path, tmp_path / "none", *text)
    assert result.exit_code == 2
    assert "calibration with one layer in memory at a time takes about" in result.stderr
    assert "fewer tokens, or shares of them (calibrate --shard i/n, then merge)" in result.stderr
    assert not (tmp_path / "none").exists()


def test_prune_calibrates_so_too(checkpoint, text, tmp_path, monkeypatch):
    given = ("--method", "drrqr", "--keep", 8, *text)
    assert invoke("prune", checkpoint.path, tmp_path / "whole", *given).exit_code == 0
    with_memory(monkeypatch, pruning.memory.streaming_memory(checkpoint, 4, 64).total)
    result = invoke("prune", checkpoint.path, tmp_path / "streamed", *given)
    assert result.exit_code == 0, result.output
    assert "one layer at a time" in result.stderr
    for file in ("model.safetensors", "state_reduction.json"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_interrupted_command_goes_on_layer_by_layer_also_where_the_model_fits_now(
    checkpoint, text, tmp_path, monkeypatch
):
    out, partial = tmp_path / "s", tmp_path / "s.partial"
    assert invoke("calibrate", checkpoint.path, tmp_path / "whole", *text).exit_code == 0
    seen = []
    tap = Collector.tap

    def interrupted(self, layer, *rest):
        if not seen and layer == 1:
            seen.append(layer)
            signal.raise_signal(signal.SIGINT)
        return tap(self, layer, *rest)

    monkeypatch.setattr(Collector, "tap", interrupted)
    result = invoke("calibrate", checkpoint.path, out, *text, "--stream-layers")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"interrupted: the same command goes on from {partial}"
    _, done = load_unfinished(partial)
    assert done["layer"] == 1
    assert "differs in the text" in invoke("calibrate", checkpoint.path, out, *text, "--seed", 1).stderr
    result = invoke("calibrate", checkpoint.path, out, *text)
    assert result.exit_code == 0, result.output
    assert "one layer at a time" in result.stderr
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial.exists()


def test_a_whole_models_calibration_goes_on_so_where_less_memory_is_free_now(
    checkpoint, text, tmp_path, monkeypatch
):
    out, partial = tmp_path / "s", tmp_path / "s.partial"
    assert invoke("calibrate", checkpoint.path, tmp_path / "whole", *text).exit_code == 0

    def interrupted(*args, **given):
        running = Statistics(
            checkpoint.sha256, (args[2],), pruning.collection.zeros(checkpoint.spec, FORWARD)
        )
        done = {"forward": 0, "backward": 0, "batch": 4}
        save_statistics(running, given["partial"], unfinished=done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pruning.commands.calibrate.collect", interrupted)
        assert invoke("calibrate", checkpoint.path, out, *text).exit_code == 130
    left = partial.read_bytes()
    takes = pruning.memory.whole_memory(checkpoint.spec, FORWARD, 64).total
    with_memory(monkeypatch, takes - 1)
    result = invoke("calibrate", checkpoint.path, out, *text)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and partial.read_bytes() == left
    assert f"calibration with the whole model in memory, which {partial} is of, takes about" in said
    assert "or start anew with --overwrite, one layer at a time" in said
    anew = invoke("calibrate", checkpoint.path, out, *text, "--overwrite")
    assert anew.exit_code == 0 and "one layer at a time" in anew.stderr
    out.unlink()
    partial.write_bytes(left)
    with_memory(monkeypatch, takes)
    hashed, loads = [], []
    load = pruning.statistics.load_unfinished
    monkeypatch.setattr(
        "pruning.commands.planning.Busy", lambda _, what: hashed.append(what) or nullcontext()
    )
    for place in ("commands.planning", "collection"):
        monkeypatch.setattr(f"pruning.{place}.load_unfinished", lambda file: loads.append(file) or load(file))
    result = invoke("calibrate", checkpoint.path, out, *text)
    assert result.exit_code == 0 and "one layer at a time" not in result.stderr
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert hashed == ["reading the weights", "hashing the weights", "loading the checkpoint"]
    assert loads == [partial] * 2, "once before the plan, and once to go on from by its sole user"


def test_the_criteria_that_are_named_instead_take_no_gradients(checkpoint, text, tmp_path):
    result = invoke(
        "calibrate", checkpoint.path, tmp_path / "s", *text, "--method", "taylor", "--stream-layers"
    )
    assert result.exit_code == 2
    named = " ".join(result.stderr.split()).split("a criterion without gradients: ")[1].split(", ")
    assert {"bilinear", "drrqr", "energy", "wanda"} <= set(named)
    for method in named:
        given = (*text, "--method", method, "--keep", 8, "--stream-layers")
        assert invoke("prune", checkpoint.path, tmp_path / method, *given).exit_code == 0


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("calibrate", ("--ray", "local"), "stream_layers is for one machine"),
        (
            "prune",
            ("--method", "l1", "--keep", 8, "--per-layer", "--align", 2),
            "--per-layer measures the whole model",
        ),
    ],
)
def test_options_that_contradict_it_are_refused(checkpoint, tmp_path, command, more, said):
    result = invoke(command, checkpoint.path, tmp_path / "out", "--stream-layers", *more)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_dry_run_says_what_a_config_says_where_there_are_no_weights(text, tmp_path):
    case = replace(CASES["vl-moe-fused"], dtype=torch.bfloat16)
    path = write_hybrid(tmp_path / "c", case)

    def planned(*given):
        result = invoke(*given, *text, "--stream-layers", "--dry-run")
        assert result.exit_code == 0, result.output
        return [line for line in result.stdout.splitlines() if not line.startswith("time:")]

    commands = (
        ("calibrate", path, tmp_path / "out"),
        ("prune", path, tmp_path / "out", "--method", "drrqr", "--keep", 8),
    )
    here = [planned(*command) for command in commands]
    (path / "model.safetensors").unlink()
    note = f"note: no weights in {path}: sizes are from config.json, and the time is without reading them"
    for before, command in zip(here, commands, strict=True):
        after = planned(*command)
        assert note in after
        apart = {*before} ^ ({*after} - {note})
        assert all(line.startswith("disk:") for line in apart), "only vision towers are not in the config"
    result = invoke("calibrate", path, tmp_path / "out", *text)
    assert result.exit_code == 2 and "holds neither model.safetensors" in " ".join(result.stderr.split())
