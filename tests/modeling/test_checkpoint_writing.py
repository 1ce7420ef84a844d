"""Writing checkpoint directories: shards, names, and nothing half-written under a final name."""

import json
import os
import shutil

import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint
from safetensors.torch import load_file

from lowkey.files import OutputTakenError, found_at
from lowkey.publishing import new_directory, write_json
from modeling.checkpoint import (
    export_tensors,
    open_checkpoint,
    write_safetensors,
)

INDEX = "model.safetensors.index.json"


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "config", [GATED, DELTA, {**GATED, "conv_bias": True}], ids=["gated", "delta", "bias"]
)
@pytest.mark.parametrize("shard_bytes", [2**31, 20_000])
def test_export_and_write_are_the_inverse_of_load(tmp_path, config, shard_bytes):
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "a", config, tensors))
    exported = dict(export_tensors(checkpoint.load(), checkpoint.family))
    assert_same(exported, tensors)

    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a/config.json", tmp_path / "b")
    write_safetensors(tmp_path / "b", exported.items(), shard_bytes=shard_bytes)
    again = open_checkpoint(tmp_path / "b")
    assert_same({name: again.tensor(name) for name in again.files}, tensors)
    assert_same(again.load().state_dict(), checkpoint.load().state_dict())


def test_shards_are_bounded_named_and_indexed(tmp_path):
    tensors = {"big": torch.zeros(1000)} | {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    write_safetensors(tmp_path, tensors.items(), shard_bytes=1000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 10 * 400 + 4000
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        shard_tensors = load_file(tmp_path / file)
        size = sum(t.nbytes for t in shard_tensors.values())
        assert size <= 1000 or list(shard_tensors) == ["big"]  # a tensor is never split
        assert all(torch.equal(t, tensors[name]) for name, t in shard_tensors.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, INDEX])


def test_one_shard_is_a_single_file_without_index(tmp_path):
    write_safetensors(tmp_path, [("a", torch.arange(3.0)), ("b", torch.ones(2, 2).T)])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.arange(3.0))


def test_tensors_are_taken_one_at_a_time(tmp_path):
    written_when_asked = []

    def tensors():
        for i in range(6):
            written_when_asked.append(len(list(tmp_path.glob("*.safetensors"))))
            yield f"t{i}", torch.zeros(100)

    write_safetensors(tmp_path, tensors(), shard_bytes=800)
    assert written_when_asked == [0, 0, 0, 1, 1, 2]


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep/er/out"
    with new_directory(target) as directory:
        (directory / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert os.stat(target).st_mode & 0o777 == 0o755
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_nothing_new_and_nothing_lost(tmp_path, existing):
    target = tmp_path / "out"
    if existing:
        target.mkdir()
        (target / "old").write_text("old")

    def fill():
        with new_directory(target, replaces=found_at(target)) as directory:
            (directory / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fill()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == (
        ["out", "out/old"] if existing else []
    )


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(
        OutputTakenError, match="out has appeared or changed since the command began"
    ) as taken:
        with new_directory(target) as directory:
            (directory / "new").write_text("new")
    assert (target / "old").read_text() == "old" and (taken.value.kept / "new").read_text() == "new"
    with new_directory(target, replaces=found_at(target)) as directory:
        (directory / "new").write_text("new")
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]


def test_write_json_replaces_whole_files(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    write_json(file, [2])
    assert json.loads(file.read_text()) == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
