"""What is said before the work is done, against what the work then takes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import DELTA, GATED, write_checkpoint
from hybrid_cases import CASES
from hybrids import write_hybrid
from reducing import random_keep, reduce

from lowkey.words import duration, in_units
from modeling.checkpoint import open_checkpoint
from modeling.ops import chunked_gated_delta_rule
from pruning.calibration import Origin, tokens_sha256
from pruning.capacity import parameter_count
from pruning.collection import collect
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.estimate import (
    calibration_lines,
    calibration_seconds,
    disk_lines,
    reconstruction_seconds,
    reduced_bytes,
    stored_bytes,
    time_line,
    training_seconds,
    width_notes,
)
from pruning.memory import statistics_bytes, whole_memory
from pruning.statistics import names_for, save_statistics

WINDOWS = torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[GATED, DELTA], ids=["gated", "delta"])
def checkpoint(request, tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "dense", request.param))


def test_sizes_are_those_of_the_files_that_are_written(checkpoint, tmp_path):
    model = checkpoint.load()
    assert parameter_count(checkpoint.spec) == sum(p.numel() for p in model.parameters())
    for method in ("drrqr", "taylor", "loss-aware"):
        needed = CRITERIA[method].statistics
        origin = Origin("t", "0" * 64, 0, 4, 32, tokens_sha256(WINDOWS))
        file = tmp_path / method
        save_statistics(collect(model, WINDOWS, origin, checkpoint.sha256, needed=needed), file)
        said = statistics_bytes(checkpoint.spec, names_for(needed))
        assert said <= file.stat().st_size < said + 20_000, "the header comes on top"
    widths = (4, 32, 7)
    reduce(
        checkpoint,
        random_keep(checkpoint.spec, [min(n, d) for n, d in zip(widths, checkpoint.spec.d_k, strict=True)]),
        tmp_path / "out",
    )
    said = reduced_bytes(checkpoint, open_checkpoint(tmp_path / "out").spec.d_k)
    assert abs(said - (tmp_path / "out/model.safetensors").stat().st_size) < 4_000


def test_lines_of_a_calibration_say_passes_memory_and_time(checkpoint):
    spec = checkpoint.spec
    device = torch.device("cpu")

    def lines(needed):
        names = names_for(needed)
        seconds = calibration_seconds(spec, names, WINDOWS, device)
        memory = whole_memory(spec, names, WINDOWS.shape[1])
        return [*calibration_lines(names, WINDOWS, memory), time_line([("calibration", seconds)], device)]

    plain, both = lines(()), lines(("gate_fisher",))
    assert plain[0] == "calibration: 128 tokens, 4 windows of 32; forward"
    assert both[0].endswith("; forward, then forward and backward")
    for lines in (plain, both):
        assert re.fullmatch(
            r"memory: about \S+ [MG]B \(weights in float32 .*, activations .*, statistics .*\)", lines[1]
        )
        assert re.fullmatch(r"time: about \S+ (s|min|h) on cpu, by one window through one layer", lines[2])


@pytest.mark.parametrize(
    ("before", "after", "notes"),
    [
        ([128] * 2, [128] * 2, []),
        ([64], [32], []),
        ([128], [64], []),
        ([96, 96], [48, 24], ["d_k 24: no multiple of 16", "d_k 48: decode kernels pad"]),
        ([128, 128], [96, 64], ["d_k 96: decode kernels pad"]),
        ([128, 64], [64, 64], []),
    ],
)
def test_widths_that_lose_a_kernel_are_named(before, after, notes):
    found = list(width_notes(before, after))
    assert len(found) == len(notes)
    assert all(f"note: {note}" in line for note, line in zip(notes, found, strict=True))


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path):
    out = tmp_path / "not/yet/there"
    assert re.fullmatch(
        r"disk: 1\.0 KB for a and 3\.0 MB for b; \S+ [MG]B free",
        *disk_lines([("a", 1000), ("b", 3_000_000)], out),
    )
    with pytest.raises(PruningError, match=r"out='.*there' needs 1000000\.0 GB, but there is .* free"):
        [*disk_lines([("much", 10**15)], out)]
    said, note = disk_lines([("much", 10**15)], out, dry_run=True)
    assert said.startswith("disk: 1000000.0 GB for much; ")
    assert re.fullmatch(r"note: out='.*there' needs 1000000\.0 GB, but there is .* free", note)


def test_figures_for_people():
    assert [in_units(n) for n in (12, 1500, 26_345_472, 2e9)] == ["12 bytes", "1.5 KB", "26.3 MB", "2.0 GB"]
    assert [duration(s) for s in (0.01, 59.6, 300, 9000)] == ["1 s", "60 s", "5 min", "2.5 h"]


def test_what_trains_is_timed_with_the_rule_that_training_takes(checkpoint, monkeypatch):
    calls = []

    def rule(inputs):
        calls.append(inputs.v.requires_grad)
        return chunked_gated_delta_rule(inputs)

    monkeypatch.setattr("pruning.estimate.training_rule", lambda device: rule)
    spec, device = checkpoint.spec, torch.device("cpu")
    kinds = len(set(spec.layers))
    assert training_seconds(spec, spec, 10, 32, device) > 0
    assert calls == [True] * 2 * kinds + [False] * 2 * kinds, (
        "the student, then the teacher; each layer twice"
    )
    calls.clear()
    assert reconstruction_seconds(spec, 10, 10, 32, device) > 0
    assert sorted(calls) == [False] * 2 * kinds + [True] * 2 * kinds


def test_reconstruction_fits_linear_layers_alone_and_runs_none_behind_them(tmp_path, monkeypatch):
    spec = open_checkpoint(write_hybrid(tmp_path / "dense", CASES["next"])).spec
    linear = len(spec.linear_layers)
    assert linear < len(spec.layers)
    monkeypatch.setattr("pruning.estimate._layers_seconds", lambda spec, *_: len(spec.layers))
    found = reconstruction_seconds(spec, 1000, 1, 32, torch.device("cpu"))
    assert found == 1000 * (spec.linear_layers[-1] + 1) + linear


MEASURED = """
import re, sys
from pathlib import Path
from pruning.cli import app
app(sys.argv[1:], standalone_mode=False)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["drrqr", "loss-aware"])
def test_memory_said_is_about_memory_taken(tmp_path, method):
    config = {
        **GATED,
        "hidden_size": 768,
        "num_hidden_layers": 4,
        "num_heads": 6,
        "num_v_heads": 6,
        "head_dim": 128,
    }
    config |= {"expand_v": 1.0, "intermediate_size": 2048, "vocab_size": 16000}
    path = write_checkpoint(tmp_path / "dense", config)
    arguments = ["calibrate", str(path), str(tmp_path / "s"), "--method", method, "--tokens", "2048"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, timeout=800, check=True
    )
    taken = int(done.stdout.split()[-1])
    said, unit = re.search(r"memory: about (\S+) ([MG])B", done.stderr).groups()
    said = float(said) * {"M": 1e6, "G": 1e9}[unit]
    print(json.dumps({"method": method, "said": said, "taken": taken}))
    assert 0.6 < taken / said < 1.25


@pytest.mark.parametrize("name", ["vl-dense-tied", "vl-moe-fused", "next", "olmo"])
def test_the_bytes_of_a_reduced_hybrid_are_known_before(tmp_path, name):
    checkpoint = open_checkpoint(write_hybrid(tmp_path / "dense", CASES[name]))
    widths = (3,) * len(checkpoint.spec.d_k)
    reduce(checkpoint, random_keep(checkpoint.spec, widths), tmp_path / "out")
    reduced = open_checkpoint(tmp_path / "out")
    before, after = (sum(c.tensor(name).nbytes for name in c.files) for c in (checkpoint, reduced))
    assert stored_bytes(checkpoint) - reduced_bytes(checkpoint, widths) == before - after
