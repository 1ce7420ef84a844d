"""`lowkey-prune prune --reconstruct`, as a user types it."""

import json
import re

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from pruning_runs import peak_of

from modeling.checkpoint import REDUCTION, open_checkpoint
from pruning.calibration import Origin
from pruning.commands.reconstructing import PlannedReconstruction
from pruning.companions import CARD
from pruning.memory import reconstruction_memory
from pruning.reconstruction import ReconstructionSettings

TEXT = ("--tokens", 256, "--window-length", 64)
FIT = ("--reconstruct", "--reconstruct-tokens", 500, "--reconstruct-steps", 6)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"{i * i}" for i in range(2000)))
    return "--text", file


def record_of(path):
    return json.loads((path / REDUCTION).read_text())


def test_the_result_says_how_its_layers_were_fitted(run, dense, text, tmp_path):
    command = ("prune", dense, "out", "--method", "bilinear", "--keep", 16, "--seed", 3, *text, *TEXT, *FIT)
    planned = run(*command, "--dry-run")
    assert (
        "\nreconstruction: 512 tokens, 8 windows of 64; two passes forward, and for each layer 6 steps of 4 windows, "
        "one layer at a time\n"
    ) in planned
    # Two hidden states of 64 numbers for each token, in float32.
    assert "hidden states 262.1 KB on cpu" in planned
    (time,) = (line for line in planned.splitlines() if line.startswith("time: "))
    assert "reconstruction" in time
    (disk,) = (line for line in planned.splitlines() if line.startswith("disk: "))
    size, again = re.search(
        r"disk: (.*) for the checkpoint and .* and (.*) for the checkpoint's largest file, which", disk
    ).groups()
    assert again == size, "it is the only file"
    assert not list(tmp_path.iterdir())

    assert "its layers fitted to the source's on 512 tokens" in run(*command)
    record = record_of(tmp_path / "out")["reconstruction"]
    assert record["tokens"] == record["origin"]["tokens"] == 512
    assert (record["origin"]["text"], record["origin"]["windows"], record["origin"]["seed"]) == (
        "text.txt",
        8,
        3,
    )
    assert record["settings"] == {"steps": 6, "batch": 4, "lr": 1e-3, "seed": 3}
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2]
    assert all(0 < layer["after"] < layer["before"] for layer in record["layers"])
    assert record["seconds"] == pytest.approx(sum(layer["seconds"] for layer in record["layers"]))
    card = (tmp_path / "out" / CARD).read_text()
    assert "then fitted, layer after layer, to what the source's layers give on 512 tokens" in card
    assert "values, gates" not in card

    run(*command[:2], "plain", *command[3:-5])
    plain, out = (open_checkpoint(tmp_path / name) for name in ("plain", "out"))
    assert record_of(plain.path)["kept_channels"] == record_of(out.path)["kept_channels"]
    assert "reconstruction" not in record_of(plain.path)
    assert plain.config == out.config
    for name in plain.files:
        fitted = ".attn" in name  # the mixer and the norm before it
        assert plain.tensor(name).equal(out.tensor(name)) != fitted, name


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "l1", "--ratio", 0.5),
        ("--method", "l1", "--keep", 16, "--per-layer", "--align", 8, "--tokens", 256),
    ],
    ids=["no statistics", "per layer"],
)
def test_text_options_are_of_the_fit_also_where_no_statistics_are_read(run, dense, text, tmp_path, options):
    run("prune", dense, "out", *options, *text, "--window-length", 64, *FIT)
    record = record_of(tmp_path / "out")
    assert record["reconstruction"]["origin"]["text"] == "text.txt"
    assert record["reconstruction"]["origin"]["window_length"] == 64
    open_checkpoint(tmp_path / "out").load()


def test_calibration_tokens_without_a_calibration_are_refused(run, dense, text):
    options = ("--method", "l1", "--keep", 16, *text, *TEXT, *FIT)
    said = " ".join(run("prune", dense, "out", *options, code=2).split())
    assert "tokens=256 is for calibration, which is not done here" in said


def test_a_text_may_be_named_beside_statistics_that_are_there(run, dense, text, tmp_path):
    run("calibrate", dense, "s.safetensors", *text, *TEXT)
    options = ("--method", "bilinear", "--keep", 16, "--stats", "s.safetensors", *text, "--window-length", 64)
    assert "drop the options of its text" in " ".join(run("prune", dense, "out", *options, code=2).split())
    run("prune", dense, "out", *options, *FIT)
    assert record_of(tmp_path / "out")["reconstruction"]["tokens"] == 512


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--reconstruct", "--export", "masked"), "export='masked' keeps channels of zeros"),
        (("--reconstruct-tokens", 100), "reconstruct_tokens=100 is for --reconstruct, which is not given"),
        (("--reconstruct-steps", 100), "reconstruct_steps=100 is for --reconstruct, which is not given"),
        (("--reconstruct", "--reconstruct-tokens", 0), "reconstruct_tokens=0 must be at least 1"),
        (("--reconstruct", "--reconstruct-steps", -1), "reconstruct_steps=-1 must be at least 1"),
        (("--reconstruct", "--reconstruct-tokens", 64), "reconstruct_tokens=64 gives 1 window of 64 tokens"),
        (
            ("--reconstruct",),
            "reconstruct_tokens=65536: windows=1024 of 64 tokens are more than text.txt gives",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(run, dense, text, tmp_path, options, said):
    command = ("prune", dense, "out", "--method", "bilinear", "--keep", 16, *text, *TEXT)
    assert said in " ".join(run(*command, *options, code=2).split())
    assert not list(tmp_path.iterdir())


def test_without_memory_for_it_nothing_is_begun(run, dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr("pruning.memory.host_memory", lambda: 100_000_000)
    command = ("prune", dense, "out", "--method", "l1", "--keep", 16, *text, "--window-length", 64, *FIT)
    said = "--reconstruct takes about"
    refused = " ".join(run(*command, code=2).split())
    assert said in refused and "or fewer --reconstruct-tokens" in refused
    assert f"note: {said}" in run(*command, "--dry-run")
    assert not list(tmp_path.iterdir())


def test_interrupted_it_leaves_the_statistics_alone(run, dense, text, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pruning.commands.reconstructing.reconstruct", interrupted)
    command = ("prune", dense, "out", "--method", "bilinear", "--keep", 16, *text, *TEXT, *FIT)
    assert "give --stats out.stats.safetensors to go on from it" in run(*command, code=130)
    assert [path.name for path in tmp_path.iterdir()] == ["out.stats.safetensors"]


def test_on_a_gpu_the_hidden_states_are_where_there_is_room(dense, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    windows = torch.zeros(1000, 40, dtype=torch.long)
    origin = Origin("t", "0" * 64, 0, *windows.shape, "0" * 64)
    planned = PlannedReconstruction(open_checkpoint(dense), windows, origin, ReconstructionSettings(), gpu)
    states = 2 * windows.numel() * 64 * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    assert planned.hidden_device == gpu
    beside = planned.memory.on(gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (beside[gpu] - 1, 10**9))
    assert planned.hidden_device == cpu
    apart = planned.memory.on(gpu)
    assert (beside[gpu] - apart[gpu], apart[cpu] - beside[cpu]) == (states, states)
    (layers,) = (line for line in planned.lines() if line.startswith("memory"))
    assert layers.endswith("hidden states 20.5 MB on cpu)")


@pytest.mark.slow
def test_it_takes_no_more_memory_than_is_said(tmp_path):
    config = {**GATED, "hidden_size": 512, "num_heads": 4, "num_v_heads": 4, "head_dim": 128, "expand_v": 1.0}
    path = write_checkpoint(tmp_path / "c", config | {"intermediate_size": 1408})
    (tmp_path / "text").write_text(" ".join(f"{i * i}" for i in range(30_000)))
    given = ("--method", "l1", "--keep", 64, "--text", tmp_path / "text")
    fit = ("--reconstruct", "--reconstruct-tokens", 32_768, "--reconstruct-steps", 2)
    _, peak, _ = peak_of("prune", path, tmp_path / "out", *given, *fit)
    windows = torch.zeros(64, 512, dtype=torch.long)
    said = reconstruction_memory(
        open_checkpoint(path), windows, 4, torch.device("cpu"), hidden_device=torch.device("cpu")
    )
    assert 0.5 * said.total < peak < said.total
