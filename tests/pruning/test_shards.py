"""Sharded checkpoints: cut shard by shard, in little memory, and quantised ones refused."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoints import GATED, random_stream, random_tensors, write_checkpoint
from reducing import random_keep, reduce
from safetensors.torch import load_file, save_file

from modeling.checkpoint import CheckpointError, open_checkpoint, write_safetensors


def shard(path, tensors, names_of_shards):
    """Spread the tensors of a checkpoint over files, in this order."""
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate(names_of_shards, start=1):
        file = f"model-{i:05d}-of-{len(names_of_shards):05d}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_shards_stay_as_they_were(tmp_path):
    tensors = random_tensors(GATED)
    path = write_checkpoint(tmp_path / "dense", GATED, tensors)
    names = sorted(tensors)
    weight_map = shard(path, tensors, [names[::2], names[1::2]])
    checkpoint = open_checkpoint(path)
    keep = random_keep(checkpoint.spec, (8, 8, 8))
    reduce(checkpoint, keep, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert list(index["weight_map"].items()) == list(weight_map.items())
    after = {}
    for file in sorted(set(weight_map.values())):
        part = load_file(tmp_path / "out" / file)
        assert set(part) == {name for name, holder in weight_map.items() if holder == file}
        after |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    whole = open_checkpoint(write_checkpoint(tmp_path / "whole", GATED, tensors))
    reduce(whole, keep, tmp_path / "single")
    single = load_file(tmp_path / "single/model.safetensors")
    assert all(torch.equal(after[name], t) for name, t in single.items())


@pytest.mark.parametrize(("dtype", "called"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_weights_are_refused_with_the_reason(tmp_path, dtype, called):
    tensors = random_tensors(GATED)
    name = "model.layers.1.attn.k_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED, tensors))
    refused = rf"tensor '{name}' is {called}, .* quantised ones have scales that span rows"
    with pytest.raises(CheckpointError, match=refused):
        reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_beside_the_weights_are_refused_before_anything_is_written(tmp_path):
    tensors = random_tensors(GATED)
    tensors["model.layers.0.attn.q_proj.weight_scale_inv"] = torch.ones(1, 1)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED, tensors))
    with pytest.raises(CheckpointError, match="weight_scale_inv"):
        reduce(checkpoint, random_keep(checkpoint.spec, (8, 8, 8)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


MEASURED = """
import re, sys
from pathlib import Path
from pruning.cli import app

def peak():  # of this process's own memory; getrusage counts what its parent held when it was forked
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

base = peak()
app(["prune", *sys.argv[1:]], standalone_mode=False)
print(base, peak())
"""


@pytest.mark.slow
def test_peak_memory_is_below_the_largest_shard_and_a_gigabyte(tmp_path):
    """A checkpoint of 1.9 GB in shards of 150 MB, in a process that may have 1.15 GB."""
    config = {
        **GATED,
        "vocab_size": 16000,
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "num_heads": 8,
        "num_v_heads": 8,
        "head_dim": 128,
        "expand_v": 1.0,
        "intermediate_size": 4096,
        "dtype": "bfloat16",
    }
    path = tmp_path / "dense"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path, random_stream(config, dtype=torch.bfloat16), shard_bytes=150 * 10**6)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    limit = max(sizes) + 10**9
    assert sum(sizes) > 1.5 * limit, "the checkpoint has to be larger than what the process may have"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "out"), "--method", "l1", "--keep", "64"],
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    base, peak = (int(n) for n in done.stdout.split()[-2:])
    figures = f"peak {peak:,} bytes, {base:,} of them before any work; {limit:,} allowed"
    assert peak < limit, figures
    print(figures)
    assert set(open_checkpoint(tmp_path / "out").spec.d_k) == {64}
