"""The memory and the disk that work takes: what is said, what is really taken, and what is refused before any work."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from checkpoints import GATED, random_stream, write_checkpoint
from hybrids import CASES, write_hybrid
from pruning_runs import RECOVER, TEXT, invoke, make_inputs, peak_of

import pruning.memory
from modeling.checkpoint import open_checkpoint, write_safetensors
from modeling.runtime import compile_model
from modeling.spec import STATE_DTYPES, StateTypes
from pruning.commands.planning import Calibration
from pruning.errors import PruningError
from pruning.evaluation import bits as module
from pruning.evaluation.bits import BitsText, bits
from pruning.statistics import FORWARD
from pruning.training import TrainingSettings

WINDOWS = torch.zeros(10, 40, dtype=torch.long)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "c", GATED))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    return ("--text", tmp_path / "text", *TEXT)


def with_memory(monkeypatch, size):
    monkeypatch.setattr(pruning.memory, "host_memory", lambda: size)


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
    compared = pruning.memory.evaluation_memory(specs, 32, gpu)
    assert compared.on(gpu) == {gpu: both.weights + on_gpu, cpu: pruning.memory.PROCESS_BYTES}
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


@pytest.mark.parametrize("teacher", [True, False])
def test_training_holds_two_models_gradients_and_moments(checkpoint, teacher):
    spec = checkpoint.spec
    narrow = spec.with_d_k((4,) * len(spec.d_k))
    settings = TrainingSettings(tokens=64, train="full", window=16, batch=2)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    student = 4 * pruning.memory.parameter_count(narrow)
    dense = 4 * pruning.memory.parameter_count(spec)
    memory = pruning.memory.training_memory(narrow, spec if teacher else None, settings, 16, cpu)
    assert (memory.weights, memory.training) == (student + (dense if teacher else 0), 3 * student)
    assert memory.waiting == 0
    more = pruning.memory.training_memory(narrow, None, replace(settings, batch=4), 16, cpu)
    assert more.activations > memory.activations
    small = pruning.memory.training_memory(narrow, spec, replace(settings, train="small"), 16, gpu)
    assert small.training < memory.training
    assert small.on(gpu)[cpu] == pruning.memory.PROCESS_BYTES + student, "it is run once on the CPU"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("recover", "error: training with train='small', which holds whole models, takes about"),
        ("sweep", "error: the evaluation of a sweep, which holds whole models, takes about"),
    ],
)
def test_sweep_and_recover_are_refused_before_any_work(text, tmp_path, monkeypatch, command, said):
    made = make_inputs(tmp_path)
    texts = ("--text", made / "text", "--heldout", made / "text")
    given = {
        "recover": (made / "dense", made / "reduced", tmp_path / "out", *texts, *RECOVER),
        "sweep": (made / "dense", tmp_path / "out", *texts, *TEXT, "--width", 8, "--method", "l1"),
    }[command]
    given = (command, *given, *(("--heldout-tokens", 512) if command == "sweep" else ()))
    with_memory(monkeypatch, 1_000_000)
    result = invoke(*given)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split()) and "1.0 MB are free" in result.stderr
    assert not (tmp_path / "out").exists()
    if command == "sweep":
        planned = invoke(*given, "--dry-run")
        assert planned.exit_code == 0, planned.output
        assert planned.stdout.splitlines()[-1].startswith(said.replace("error", "note"))


@pytest.mark.slow
def test_the_kv_cache_of_a_hybrid_counts_where_rows_are_read_together(tmp_path, monkeypatch):
    hybrid = compile_model(open_checkpoint(write_hybrid(tmp_path / "c", CASES["next"])).load())
    held, rows = {}, set()
    step = module._Reader.step

    def watched(reader, ids):
        hidden = step(reader, ids)
        lengths = reader._pool.pages.lengths.tolist()
        own = (reader._pool.tensors(row, lengths[row]) for row in range(len(ids)))
        size = sum(tensor.nbytes for tensors in own for tensor in tensors.values())
        held[reader.dtype] = max(size, held.get(reader.dtype, 0))
        rows.add(len(ids))
        return hidden

    monkeypatch.setattr(module._Reader, "step", watched)
    length = 100
    spec = hybrid.model.spec
    of_one = [spec.state_bytes(length, StateTypes.named(dtype, torch.float32)) for dtype in STATE_DTYPES]
    assert sum(of_one) > 1.5 * sum(
        spec.state_bytes(0, StateTypes.named(d, torch.float32)) for d in STATE_DTYPES
    )
    predictions = len(STATE_DTYPES) * 4 * 4 * spec.vocab_size
    monkeypatch.setattr(module, "MEMORY", int(2.5 * (sum(of_one) + predictions)))
    windows = torch.randint(1, spec.vocab_size, (3, length + 1), generator=torch.Generator().manual_seed(0))
    bits(hybrid, None, BitsText(windows, 4, windows[:, :9], []))
    assert 2 in rows and sum(held.values()) + 2 * predictions <= module.MEMORY
