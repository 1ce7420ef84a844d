"""Calibration with one layer in memory at a time, against the whole model's."""

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from checkpoints import DELTA, GATED, random_stream, write_checkpoint
from hybrids import CASES, write_hybrid
from pruning_runs import TEXT, invoke

import pruning.memory
from modeling.checkpoint import open_checkpoint, write_safetensors
from pruning.calibration import Origin, tokens_sha256
from pruning.collection import Collector, collect
from pruning.commands.planning import Calibration
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


def test_a_gpu_holds_what_computes_and_the_cpu_the_rest_and_both_are_checked(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    memory = pruning.memory.Memory(
        weights=70, activations=20, statistics=4000, hidden=300, training=5, waiting=20
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (95, 100))
    with_memory(monkeypatch, pruning.memory.PROCESS_BYTES + 4320)
    assert pruning.memory.fits(memory, gpu)
    assert not pruning.memory.fits(memory, cpu)
    assert not pruning.memory.fits(replace(memory, weights=71), gpu)
    with pytest.raises(
        PruningError, match="it takes about 96 bytes of memory on cuda, and 95 bytes are free"
    ):
        pruning.memory.check_fits(replace(memory, weights=71), gpu, "it", "leave it")
    for more in ({"statistics": 4001}, {"hidden": 301}, {"waiting": 21}):
        assert not pruning.memory.fits(replace(memory, **more), gpu)
        with pytest.raises(PruningError, match="of memory on cpu"):
            pruning.memory.check_fits(replace(memory, **more), gpu, "it", "leave it")
    with_memory(monkeypatch, memory.total)
    assert pruning.memory.fits(memory, cpu)


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


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        (
            "calibrate",
            ("--method", "taylor"),
            "calibration with gradients, which are of the whole model, takes",
        ),
        ("prune", ("--method", "loss-aware", "--keep", 8), "a criterion without gradients: "),
        (
            "prune",
            ("--method", "l1", "--keep", 8, "--per-layer", "--align", 2),
            "or one width for all layers",
        ),
        ("prune", ("--method", "l1", "--keep", 8, "--evaluate"), "or leave --evaluate out"),
    ],
)
def test_what_takes_the_whole_model_is_refused_before_any_work_and_a_dry_run_tells_it(
    checkpoint, text, tmp_path, monkeypatch, command, more, said
):
    given = text if "l1" not in more or "--per-layer" in more else ()
    with_memory(monkeypatch, 100_000_000)
    planned = invoke(command, checkpoint.path, tmp_path / "out", *given, *more, "--dry-run")
    assert planned.exit_code == 0, planned.output
    (note,) = (line for line in planned.stdout.splitlines() if line.startswith("note: ") and "memory" in line)
    assert said in note and "of memory on cpu, and 100.0 MB are free" in note
    assert "\ndisk: " in planned.stdout
    monkeypatch.setattr("pruning.commands.planning.check_finite", lambda checkpoint: pytest.fail("work"))
    result = invoke(command, checkpoint.path, tmp_path / "out", *given, *more)
    assert result.exit_code == 2
    assert note.removeprefix("note: ") in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_also_where_not_even_one_layer_fits(
    checkpoint, text, tmp_path, monkeypatch
):
    fits = invoke("calibrate", checkpoint.path, tmp_path / "s", *text, "--stream-layers", "--dry-run")
    with_memory(monkeypatch, 1_000_000)
    monkeypatch.setattr("pruning.estimate.check_writable", lambda path: 1000)
    result = invoke("calibrate", checkpoint.path, tmp_path / "s", *text, "--dry-run")
    assert result.exit_code == 0, result.output
    plan = result.stdout.splitlines()
    assert [line for line in plan if line.startswith("memory: ")] == [
        line for line in fits.stdout.splitlines() if line.startswith("memory: ")
    ]
    notes = [line for line in plan if line.startswith("note: ")]
    assert len(notes) == 2 and plan[-1] == notes[-1]
    assert notes[0].startswith(f"note: out='{tmp_path / 's'}' needs")
    assert notes[1].startswith("note: calibration with one layer in memory at a time takes about")
    refused = invoke("calibrate", checkpoint.path, tmp_path / "s", *text)
    assert refused.exit_code == 2 and refused.stdout == ""


def test_progress_is_on_the_disk_twice_while_it_is_replaced(checkpoint):
    planned = Calibration(checkpoint, FORWARD, WINDOWS, torch.device("cpu"), True, None)
    statistics = pruning.memory.statistics_bytes(checkpoint.spec, FORWARD)
    assert [size for _, size in planned.sizes()] == [statistics, 2 * (statistics + 4 * 400 * 64)]
    planned = replace(planned, streamed=False)
    assert [size for _, size in planned.sizes()] == [statistics, 2 * statistics]


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


MEASURED = """
import re, sys
from pathlib import Path
from pruning.cli import app

def peak():  # of this process's own memory; getrusage counts what its parent held when it was forked
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

base = peak()
app(sys.argv[1:], standalone_mode=False)
print(base, peak())
"""


def peak_of(*given):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, given)], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    base, peak = (int(n) for n in done.stdout.split()[-2:])
    return base, peak, done


@pytest.mark.slow
def test_peak_memory_is_far_below_the_models(text, tmp_path):
    """A model of 1.2 GB in float32 is calibrated and cut in 0.6 GB beside what the process takes."""
    config = {
        **GATED,
        "vocab_size": 4000,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_heads": 8,
        "num_v_heads": 8,
        "head_dim": 128,
        "expand_v": 1.0,
        "intermediate_size": 2560,
        "dtype": "bfloat16",
    }
    path = write_checkpoint(tmp_path / "c", config, {})
    (path / "model.safetensors").unlink()
    write_safetensors(path, random_stream(config, dtype=torch.bfloat16), shard_bytes=150 * 10**6)
    whole = 2 * sum(file.stat().st_size for file in path.glob("*.safetensors"))
    out = (path, tmp_path / "out", "--method", "drrqr", "--keep", 64, *text, "--stream-layers")
    base, peak, _ = peak_of("prune", *out)
    print(json.dumps({"whole": whole, "base": base, "peak": peak}))
    assert peak - base < 0.5 * whole


@pytest.mark.slow
def test_a_dry_run_takes_little_memory_whatever_the_model(tmp_path, text):
    """The shapes of Qwen3.5-397B-A17B, of which one layer takes 26 GB in float32."""
    case = replace(
        CASES["vl-moe-fused"], hidden=4096, k_heads=16, v_heads=64, d_k=128, d_v=128, dtype=torch.bfloat16
    )
    path = write_hybrid(tmp_path / "c", CASES["vl-moe-fused"])
    config = json.loads((path / "config.json").read_text())
    (path / "model.safetensors").unlink()
    config["text_config"] |= {
        "hidden_size": case.hidden,
        "num_hidden_layers": 60,
        "layer_types": list(case.layer_types[:4]) * 15,
        "num_attention_heads": 32,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "vocab_size": 248320,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    base, peak, done = peak_of("calibrate", path, tmp_path / "out", *text, "--stream-layers", "--dry-run")
    print(done.stdout)
    assert peak - base < 2 * 10**9


def test_evaluation_says_what_two_whole_models_take(checkpoint, tmp_path, monkeypatch):
    specs = [checkpoint.spec, checkpoint.spec.with_d_k((4,) * len(checkpoint.spec.d_k))]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    alone, both = (pruning.memory.evaluation_memory(specs[:n], 32, cpu) for n in (1, 2))
    assert both.weights == alone.weights + 4 * pruning.memory.parameter_count(specs[1])
    assert pruning.memory.evaluation_memory([*specs, specs[0]], 32, cpu).weights == 2 * alone.weights
    # On a GPU more windows run together, though no more of them are predicted at once.
    on_gpu = pruning.memory.evaluation_memory(specs, 32, gpu).activations
    assert on_gpu - both.activations == 28 * 32 * (both.activations - 4 * 6 * 32 * 257) // (4 * 32)
    turns = pruning.memory.before_and_after_memory(*specs, 32, gpu)
    first, second = (4 * pruning.memory.parameter_count(spec) for spec in specs)
    assert turns.on(gpu) == {gpu: first + on_gpu, cpu: pruning.memory.PROCESS_BYTES + second}
    assert pruning.memory.before_and_after_memory(*specs, 32, cpu).total == both.total
    with_memory(monkeypatch, alone.total)
    monkeypatch.setattr("pruning.commands.evaluate.check_finite", lambda checkpoint: pytest.fail("work"))
    result = invoke("evaluate", checkpoint.path, checkpoint.path, "--window", 32)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "evaluation, which holds whole models in float32, takes about" in said and "smaller models" in said


COMPARED = """
import re, sys
from pathlib import Path
import torch
from modeling.checkpoint import open_checkpoint
from pruning.evaluation import compare
from pruning.memory import PROCESS_BYTES, evaluation_memory

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

checkpoint = open_checkpoint(Path(sys.argv[1]))
models = [checkpoint.load(), checkpoint.load()]
windows = torch.randint(0, 248_320, (4, 513), generator=torch.Generator().manual_seed(0))
compare(models[0], models[1], windows[:, :9])
base = peak()
compare(*models, windows)
print(base, peak(), evaluation_memory([checkpoint.spec] * 2, 512, torch.device("cpu")).activations)
"""


@pytest.mark.slow
def test_predictions_over_a_large_vocabulary_take_what_is_said(tmp_path):
    """Six tensors like the logits are alive together, and those of a whole window would be of 0.5 GB each."""
    path = write_checkpoint(tmp_path / "c", {**GATED, "vocab_size": 248_320})
    done = subprocess.run(
        [sys.executable, "-c", COMPARED, str(path)], capture_output=True, text=True, timeout=800, check=True
    )
    base, peak, said = map(int, done.stdout.split())
    print(json.dumps({"base": base, "taken": peak - base, "said": said}))
    assert 0.5 < (peak - base) / said < 1.1
    assert said < 0.6 * 10**9
