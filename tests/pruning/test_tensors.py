"""A checkpoint whose tensors are not what its config says: one line that names the tensor, from every command."""

import pytest
import torch
from checkpoints import GATED, random_tensors, write_checkpoint
from safetensors.torch import save_file
from typer.testing import CliRunner

from modeling.checkpoint import CheckpointError, open_checkpoint
from pruning.cli import app
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.statistics import load_statistics, merge, save_statistics

Q, CONV, NORM = (
    f"model.layers.1.attn.{part}.weight" for part in ("q_proj", "k_conv1d", "o_norm")
)  # fmt: skip
EMBEDDINGS = "model.embeddings.weight"

BROKEN = {
    "one axis": (Q, lambda t: t.flatten(), "has shape [4096], the config says [64, 64]"),
    "one row less": (Q, lambda t: t[:-1], "has shape [63, 64], the config says [64, 64]"),
    "an axis in front": (Q, lambda t: t[None], "has shape [1, 64, 64], the config says [64, 64]"),
    "no axis": (NORM, lambda t: t[0], "has shape [], the config says [24]"),
    "a filter too short": (CONV, lambda t: t[..., :3], "has shape [64, 1, 3], the config says [64, 4]"),
    "transposed": (EMBEDDINGS, lambda t: t.T, "has shape [64, 257], the config says [257, 64]"),
    "whole numbers": (Q, lambda t: t.to(torch.int32), "is I32, and weights are read as F64, F32, BF16, F16"),
    "eight bits": (Q, lambda t: t.to(torch.float8_e4m3fn), "is F8_E4M3, and weights are read as"),
    "truth values": (NORM, lambda t: t > 0, "is BOOL, and weights are read as"),
    "missing": (Q, None, "is missing"),
}


def broken_tensors(how):
    name, change, _ = BROKEN[how]
    tensors = random_tensors(GATED)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    return tensors


@pytest.fixture
def broken(tmp_path):
    def broken(how):
        path = write_checkpoint(tmp_path / "dense", GATED, broken_tensors(how))
        return path, f"tensor {BROKEN[how][0]!r} {BROKEN[how][2]}"

    return broken


def refused(tmp_path, said, *arguments):
    before = sorted(p for p in tmp_path.rglob("*"))
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert sorted(p for p in tmp_path.rglob("*")) == before


COMMANDS = {
    "calibrate": ("calibrate", "DENSE", "s.safetensors"),
    "evaluate": ("evaluate", "DENSE", "--json", "e.json"),
    "inspect": ("inspect", "DENSE"),
    "dry run": ("prune", "DENSE", "out", "--method", "l1", "--keep", 8, "--dry-run"),
    "per layer": ("prune", "DENSE", "out", "--method", "l1", "--keep", 16, "--per-layer"),
    **{method: ("prune", "DENSE", "out", "--method", method, "--keep", 8) for method in CRITERIA},
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_tensor_and_writes_nothing(broken, tmp_path, monkeypatch, command, how):
    monkeypatch.chdir(tmp_path)
    path, said = broken(how)
    refused(tmp_path, said, *(path if a == "DENSE" else a for a in COMMANDS[command]))


@pytest.mark.parametrize("how", BROKEN)
def test_what_the_server_loads_is_checked_too(broken, how):
    path, said = broken(how)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path).load(dtype=torch.bfloat16)
    assert said in str(e.value)


@pytest.mark.parametrize("how", ["one axis", "eight bits", "missing"])
def test_recovery_checks_both_checkpoints(broken, tmp_path, how):
    path, said = broken(how)
    reduced = tmp_path / "reduced"
    good = write_checkpoint(tmp_path / "good", GATED)
    made = CliRunner().invoke(app, ["prune", str(good), str(reduced), "--method", "l1", "--keep", "8"])
    assert made.exit_code == 0
    refused(tmp_path, said, "recover", path, reduced, tmp_path / "out")
    tensors = {name: open_checkpoint(reduced).tensor(name) for name in open_checkpoint(reduced).files}
    tensors[Q] = tensors[Q][:, :-1].contiguous()
    save_file(tensors, reduced / "model.safetensors")
    refused(
        tmp_path, "has shape [16, 63], the config says [16, 64]", "recover", good, reduced, tmp_path / "out"
    )


def test_an_index_that_names_a_file_without_the_tensor_is_one_line_too(tmp_path):
    path = write_checkpoint(tmp_path / "dense", GATED)
    names = open_checkpoint(path).files
    (path / "model.safetensors").rename(path / "most.safetensors")
    other = dict.fromkeys(names, "most.safetensors") | {Q: "other.safetensors"}
    save_file({"x": torch.zeros(1)}, path / "other.safetensors")
    (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {' + ", ".join(f'"{n}": "{f}"' for n, f in other.items()) + "}}"
    )
    refused(tmp_path, f"other.safetensors: tensor {Q!r} can't be read", "inspect", path)


@pytest.fixture(scope="module")
def statistics(dense, tmp_path_factory):
    file = tmp_path_factory.mktemp("s") / "s.safetensors"
    options = ["--tokens", "256", "--window-length", "64"]
    assert CliRunner().invoke(app, ["calibrate", str(dense), str(file), *options]).exit_code == 0
    return load_statistics(file)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda t: t[:, :-1]),
        ("k_sum", lambda t: t[0]),
        ("x_squares", lambda t: t[None]),
        ("k", lambda t: t.float()),
    ],
)
@pytest.mark.parametrize("command", ["merge", "prune", "report"])
def test_statistics_of_other_shapes_are_one_line_too(dense, statistics, tmp_path, command, name, change):
    file = tmp_path / "s.safetensors"
    statistics.layers[1][name], whole = (
        change(statistics.layers[1][name]).contiguous(),
        statistics.layers[1][name],
    )
    try:
        save_statistics(statistics, file)
    finally:
        statistics.layers[1][name] = whole
    arguments = {
        "merge": ("merge", file, "--out", tmp_path / "out"),
        "prune": ("prune", dense, tmp_path / "out", "--method", "drrqr", "--keep", 8, "--stats", file),
        "report": ("report", tmp_path / "out", file),
    }[command]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2, result.output + repr(result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {file} is not a statistics file of lowkey-prune (")
    assert not (tmp_path / "out").exists()


def test_parts_of_other_layers_are_not_merged(statistics, tmp_path):
    file = tmp_path / "s.safetensors"
    save_statistics(statistics, file)
    other = load_statistics(file)
    object.__setattr__(other, "layers", {i: other.layers[i] for i in (0, 1)})
    with pytest.raises(PruningError, match="are of other layers or widths"):
        merge([statistics, other])
