"""`lowkey-prune recover`: two checkpoints in, one out."""

import json

import pytest
import torch
from checkpoints import GATED, random_tensors, write_checkpoint
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling.checkpoint import REDUCTION, open_checkpoint
from pruning import recovery
from pruning.cli import app
from pruning.companions import RECOVERY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint of mixed dtypes, two reduced ones, and text."""
    folder = tmp_path_factory.mktemp("recover")
    tensors = {
        name: t if name.endswith(("A_log", "dt_bias")) else t.bfloat16()
        for name, t in random_tensors(GATED).items()
    }
    write_checkpoint(folder / "dense", GATED, tensors)
    (folder / "dense" / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "text.txt").write_text(" ".join(f"{i * i}" for i in range(2000)))
    invoke(folder, "prune", "dense", "uniform", "--method", "l1", "--keep", 8)
    text = ("--text", folder / "text.txt", "--tokens", 64, "--window-length", 32)
    invoke(
        folder,
        "prune",
        "dense",
        "layered",
        "--method",
        "l1",
        "--keep",
        16,
        "--per-layer",
        "--align",
        8,
        *text,
    )
    return folder


def invoke(folder, *args, code=0):
    args = [str(folder / a) if a in ("dense", "uniform", "layered") else str(a) for a in args]
    if args[0] == "prune":
        args[2] = str(folder / args[2])
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, args)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def recover(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def recover(dense, reduced, out, *options, code=0):
        text = [f"--{kind}={folder / 'text.txt'}" for kind in ("text", "heldout")]
        small = ("--tokens=600", "--window-length=64", "--batch=2", "--heldout-tokens=1024")
        return invoke(folder, "recover", dense, reduced, out, *text, *small, *options, code=code)

    return recover


@pytest.mark.parametrize("train", ["lora", "small", "full"])
@pytest.mark.parametrize("reduced", ["uniform", "layered"])
def test_the_output_is_the_reduced_checkpoint_trained(recover, folder, tmp_path, reduced, train):
    printed = recover("dense", reduced, "out", "--train", train, "--lr", "3e-3")
    source, out = open_checkpoint(folder / reduced), open_checkpoint(tmp_path / "out")
    assert out.spec == source.spec
    assert len(set(out.spec.d_k)) == (1 if reduced == "uniform" else 2)
    assert out.config == source.config
    assert set(out.files) == set(source.files)
    for name in source.files:
        a, b = source.tensor(name), out.tensor(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj"):
            assert not a.equal(b), name
        elif part in ("v_proj", "up_proj", "embeddings"):
            assert a.equal(b) == (train == "small" or (train == "lora" and part != "v_proj")), name
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / reduced / name).read_bytes()

    record = json.loads((tmp_path / "out" / RECOVERY).read_text())
    curve = record.pop("curve")
    assert json.loads((tmp_path / "out" / REDUCTION).read_text()) == {**source.reduction, "recovery": record}
    assert (record["format"], record["control"], record["distilled"]) == (1, False, True)
    assert record["dense"]["sha256"] == open_checkpoint(folder / "dense").sha256
    assert record["reduced"]["sha256"] == source.sha256
    assert (record["steps"], record["tokens"]) == (5, 640)
    assert record["settings"]["train"] == train
    assert [p["tokens"] for p in curve] == [0, 128, 256, 384, 512, 640]
    measured = record["evaluation"]
    assert measured["before"]["loss"] == curve[0]["heldout_loss"]
    # The last point is before the weights are rounded to bfloat16.
    assert measured["after"]["loss"] == pytest.approx(curve[-1]["heldout_loss"], abs=0.02)
    if train == "full":
        assert measured["after"]["loss"] < measured["before"]["loss"]
    assert f"{record['trained_parameters']:,} parameters trained on 640 tokens" in printed
    # Nothing else is left: no progress, no half-written directory.
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "recovered on 640 tokens" in invoke(folder, "inspect", tmp_path / "out")


def test_the_control_is_the_dense_checkpoint_on_the_same_tokens(recover, folder, tmp_path, monkeypatch):
    read, train = [], recovery.train

    def spy(model, teacher, batches, *args, **kwargs):
        read.append(torch.stack([batches[i] for i in range(5)]))
        return train(model, teacher, batches, *args, **kwargs)

    monkeypatch.setattr(recovery, "train", spy)
    recover("dense", "uniform", "recovered")
    recover("dense", "uniform", "control", "--control")
    assert read[0].equal(read[1]), "the same windows in the same order"
    control, dense = open_checkpoint(tmp_path / "control"), open_checkpoint(folder / "dense")
    assert control.spec == dense.spec
    assert control.reduction is None
    ours, theirs = (json.loads((tmp_path / name / RECOVERY).read_text()) for name in ("control", "recovered"))
    assert (ours["control"], ours["distilled"]) == (True, False)
    for key in ("settings", "text", "tokens", "dense", "reduced"):
        assert ours[key] == theirs[key]
    assert all(point["train_kl"] is None for point in ours["curve"])
    assert load_file(tmp_path / "control" / "model.safetensors").keys() == dense.files.keys()


def test_a_failure_at_the_end_leaves_no_output_and_the_same_command_finishes(
    recover, folder, tmp_path, monkeypatch
):
    recover("dense", "uniform", "undisturbed")
    with monkeypatch.context() as m:
        m.setattr(
            recovery, "check_runs", lambda *a: (_ for _ in ()).throw(recovery.PruningError("disk on fire"))
        )
        assert "disk on fire" in recover("dense", "uniform", "out", code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.progress.safetensors", "undisturbed"]
    assert "with other settings" in recover("dense", "uniform", "out", "--lr", "1", code=2)
    assert "going on after step 5 of 5" in recover("dense", "uniform", "out")
    one, other = (open_checkpoint(tmp_path / name) for name in ("undisturbed", "out"))
    assert one.sha256 == other.sha256
    assert not (tmp_path / "out.progress.safetensors").exists()


def test_outputs_and_pairs_that_cant_be_right_are_refused(recover, folder, tmp_path):
    write_checkpoint(tmp_path / "other", GATED, seed=1)
    recover("dense", "uniform", "out")
    assert "already exists" in recover("dense", "uniform", "out", code=2)
    recover("dense", "uniform", "out", "--overwrite")
    assert "is a checkpoint to read" in recover("dense", "uniform", folder / "uniform", "--overwrite", code=2)
    assert f"holds no {RECOVERY}" in recover("dense", "uniform", tmp_path / "other", "--overwrite", code=2)
    assert f"holds no {REDUCTION}" in recover("dense", "dense", "new", code=2)
    assert "is recovered already" in recover("dense", tmp_path / "out", "new", code=2)
    assert f"not from {tmp_path / 'other'}" in recover(tmp_path / "other", "uniform", "new", code=2)
    assert "train='some' must be one of" in recover("dense", "uniform", "new", "--train", "some", code=2)
    assert "nothing to learn from" in recover(
        "dense", "uniform", "new", "--ce-weight", 0, "--control", code=2
    )
    assert not (tmp_path / "new").exists()


def test_peft_is_asked_for_only_where_it_is_used(recover, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    said = recover("dense", "uniform", "out", "--train", "lora", code=2)
    assert "pip install -e '.[recover]' in a checkout" in said
    recover("dense", "uniform", "out", "--train", "small")
    assert torch.isfinite(open_checkpoint(tmp_path / "out").load().norm.weight).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_copy_of_tied_embeddings_stays_one(recover, tmp_path, dtype):
    """Also where it was stored wider than the embeddings: rounded apart, the two would no longer be the same."""
    config = {**GATED, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["model.embeddings.weight"] = tensors["model.embeddings.weight"].bfloat16()
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].to(dtype, copy=True)
    dense = write_checkpoint(tmp_path / "tied", config, tensors)
    invoke(tmp_path, "prune", dense, "reduced", "--method", "l1", "--keep", 8)
    recover(dense, tmp_path / "reduced", tmp_path / "out", "--train", "full", "--lr", "3e-3")
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(trained["lm_head.weight"], trained["model.embeddings.weight"])
    assert not torch.equal(trained["lm_head.weight"], tensors["lm_head.weight"])
    open_checkpoint(tmp_path / "out").load()
