"""Weights that are NaN or Inf, wherever they are; and dry runs that refuse what the run itself would refuse."""

import json

import pytest
import torch
from checkpoints import GATED, random_tensors, write_checkpoint
from pruning_runs import RECOVER, TEXT
from reducing import random_keep
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pruning.commands.calibrate
import pruning.commands.prune
import pruning.recovery
from modeling.checkpoint import Checkpoint, open_checkpoint
from pruning.cli import app
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.finite import check_finite, finite
from pruning.statistics import load_statistics, save_statistics
from pruning.surgery import Cut, write_shards

EMBEDDINGS = "model.embeddings.weight"


def run(*arguments, code=2):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def checkpoint_with(path, name, value, at=-1):
    tensors = random_tensors(GATED)
    tensors[name].view(-1)[at] = value
    return write_checkpoint(path, GATED, tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 4)])
def test_one_entry_is_found_in_any_dtype_and_shape(dtype, value, shape):
    tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    assert finite(tensor, "x", "source") is tensor
    for at in range(tensor.numel()):
        bad = tensor.clone()
        bad.view(-1)[at] = value
        with pytest.raises(PruningError, match="^source: tensor 'x' holds NaN or Inf$"):
            finite(bad, "x", "source")


COMMANDS = {
    "calibrate": ("calibrate", "DENSE", "OUT", *TEXT),
    "calibrate, dry run": ("calibrate", "DENSE", "OUT", *TEXT, "--dry-run"),
    **{method: ("prune", "DENSE", "OUT", "--method", method, "--keep", 8) for method in CRITERIA},
    "dry run": ("prune", "DENSE", "OUT", "--method", "l1", "--keep", 8, "--dry-run"),
    "per layer": ("prune", "DENSE", "OUT", "--method", "l1", "--keep", 16, "--per-layer"),
    "recover": ("recover", "DENSE", "REDUCED", "OUT"),
    "control": ("recover", "DENSE", "REDUCED", "OUT", "--control"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_row_that_no_text_touches_is_found_before_the_work_and_named(tmp_path, monkeypatch, command):
    """The checkpoint runs on any text: the entry belongs to the last token of the vocabulary, which no text has."""
    good = write_checkpoint(tmp_path / "good", GATED)
    reduced = tmp_path / "reduced"
    run("prune", good, reduced, "--method", "l1", "--keep", 8, code=0)
    if command in ("recover", "control"):  # the reduced one has to be of this source
        dense, bad = good, reduced
        tensors = load_file(reduced / "model.safetensors")
        tensors[EMBEDDINGS][-1, 0] = torch.nan
        save_file(tensors, reduced / "model.safetensors")
    else:
        dense = bad = checkpoint_with(tmp_path / "bad", EMBEDDINGS, torch.nan)
    for module, name in (
        (Checkpoint, "load"),
        (pruning.commands.calibrate, "draw"),
        (pruning.commands.prune, "draw"),
        (pruning.commands.prune, "select"),
        (pruning.recovery, "token_stream"),
    ):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("work began"))
    before = sorted(tmp_path.rglob("*"))
    places = {"DENSE": dense, "REDUCED": reduced, "OUT": tmp_path / "out"}
    result = run(*(places.get(a, a) for a in COMMANDS[command]))
    assert result.stdout == "" and result.stderr == f"error: {bad}: tensor '{EMBEDDINGS}' holds NaN or Inf\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_every_tensor_that_is_written_is_looked_at(tmp_path):
    dense = write_checkpoint(tmp_path / "dense", GATED)
    for i, name in enumerate(load_file(dense / "model.safetensors")):
        checkpoint = open_checkpoint(checkpoint_with(tmp_path / f"c{i}", name, torch.inf, at=0))
        with pytest.raises(PruningError, match=f"tensor '{name}' holds NaN or Inf"):
            check_finite(checkpoint)
        keep = [Cut(i, torch.arange(8).repeat(2, 1)) for i in range(3)]
        (tmp_path / f"out{i}").mkdir()
        with pytest.raises(PruningError, match=f"c{i}: tensor '{name}' holds NaN or Inf"):
            write_shards(checkpoint, keep, tmp_path / f"out{i}")


def test_what_overflows_while_it_is_cut_is_not_written(tmp_path):
    """A mixture of float16 weights near their largest value is beyond it."""
    name = "model.layers.1.attn.q_proj.weight"
    tensors = {n: t.half() for n, t in random_tensors(GATED).items()}
    tensors[name].fill_(60000)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED, tensors))
    check_finite(checkpoint)
    rotation = torch.eye(32, dtype=torch.float64)
    rotation[0] = 32**-0.5
    cuts = [
        Cut(i, keep, rotation.repeat(2, 1, 1))
        for i, keep in enumerate(random_keep(checkpoint.spec, (32,) * 3))
    ]
    with pytest.raises(PruningError, match=f"dense: tensor '{name}' holds NaN or Inf"):
        write_shards(checkpoint, cuts, tmp_path)


def test_training_that_overflows_the_stored_dtype_writes_nothing(tmp_path, monkeypatch):
    tensors = {n: t.half() for n, t in random_tensors(GATED).items()}
    dense, reduced = write_checkpoint(tmp_path / "dense", GATED, tensors), tmp_path / "reduced"
    run("prune", dense, reduced, "--method", "l1", "--keep", 8, code=0)
    (tmp_path / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    train = pruning.recovery.train

    def overflowing(model, *args, **kwargs):
        result = train(model, *args, **kwargs)
        model.norm.weight.data[0] = 1e6
        return result

    monkeypatch.setattr(pruning.recovery, "train", overflowing)
    text = ("--text", tmp_path / "text", "--heldout", tmp_path / "text")
    result = run("recover", dense, reduced, tmp_path / "out", *RECOVER, *text)
    said = f"error: {reduced}: after training, in the checkpoint's own dtype: tensor 'model.norm.weight' holds NaN"
    assert result.stderr.splitlines()[-1].startswith(said) and not (tmp_path / "out").exists()


# Dry runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("dense", "other")):
        write_checkpoint(folder / name, GATED, seed=seed)
        run("calibrate", folder / name, folder / f"{name}.safetensors", *TEXT, code=0)
    (folder / "garbage.safetensors").write_bytes(b"garbage")
    return folder


REFUSED = {
    "statistics of another checkpoint": (
        ("--method", "drrqr", "--keep", 8, "--stats", "other.safetensors"),
        "the statistics were taken from a checkpoint with sha256",
    ),
    "statistics without gradients": (
        ("--method", "taylor", "--keep", 8, "--stats", "dense.safetensors"),
        "these statistics do not hold q_gradient, k_gradient",
    ),
    "no statistics file": (
        ("--method", "drrqr", "--keep", 8, "--stats", "garbage.safetensors"),
        "is not a statistics file of lowkey-prune",
    ),
    "mixtures per layer": (
        ("--method", "pca", "--keep", 16, "--per-layer"),
        "method='pca' mixes channels",
    ),
    "windows without a token to predict": (
        ("--method", "taylor", "--keep", 16, "--window-length", 1),
        "window_length=1 leaves no token to predict",
    ),
    "layers measured on windows without a token to predict": (
        ("--method", "l1", "--keep", 16, "--per-layer", "--window-length", 1),
        "window_length=1 leaves no token to predict",
    ),
    "less state than the smallest widths per layer have": (
        ("--method", "l1", "--keep", 8, "--per-layer"),
        "the state with d_k 16; raise it, or allow narrower widths with --align",
    ),
}


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_before_the_work_and_by_a_dry_run(made, tmp_path, monkeypatch, what, more):
    monkeypatch.setattr(Checkpoint, "load", lambda *a, **k: pytest.fail("work began"))
    options, said = REFUSED[what]
    options = [made / a if str(a).endswith(".safetensors") else a for a in options]
    result = run("prune", made / "dense", tmp_path / "out", *options, *more)
    assert said in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("command", ["calibrate", "prune"])
def test_what_another_calibration_left_is_found_before_the_model_is_loaded(
    made, tmp_path, monkeypatch, command, more
):
    monkeypatch.setattr(Checkpoint, "load", lambda *a, **k: pytest.fail("work began"))
    left = load_statistics(made / "dense.safetensors")
    out = tmp_path / "out.stats.safetensors"
    done = {"forward": 4, "backward": 0, "batch": 4}
    save_statistics(left, out.with_name(f"{out.name}.partial"), unfinished=done)
    prune = ("prune", made / "dense", tmp_path / "out", "--method", "drrqr", "--keep", 8)
    arguments = {"calibrate": ("calibrate", made / "dense", out), "prune": prune}[command]
    result = run(*arguments, "--tokens", 512, "--window-length", 64, *more)
    said = "is of an interrupted calibration that differs in the text or how it is drawn"
    assert said in result.stderr and result.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == [f"{out.name}.partial"]


def test_gradients_need_a_token_to_predict_before_any_window_is_run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", lambda *a, **k: pytest.fail("work began"))
    options = ("--method", "taylor", "--window-length", 1, "--tokens", 64)
    result = run("calibrate", made / "dense", tmp_path / "s.safetensors", *options)
    assert result.stderr == "error: window_length=1 leaves no token to predict; give at least 2\n"


def test_messages_name_the_source_and_not_the_directory_that_is_gone(tmp_path, monkeypatch):
    dense = write_checkpoint(tmp_path / "dense", GATED)
    monkeypatch.setattr(
        pruning.reduction, "write_reduced", _with_other_norms(pruning.reduction.write_reduced)
    )
    result = run("prune", dense, tmp_path / "out", "--method", "l1", "--keep", 8)
    said = (
        f"error: {dense}: the checkpoint that was made of it does not load or run: the config reads back as"
    )
    assert said in result.stderr and "/.out." not in result.stderr


def _with_other_norms(write):
    def written(*arguments):
        spec, directory = write(*arguments), arguments[2]
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-3}))
        return spec

    return written
