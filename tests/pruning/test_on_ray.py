"""`lowkey-prune calibrate --ray`: what it refuses, and a cluster of two nodes on this machine."""

import json
import sys
import threading
import time

import pytest
import torch
from checkpoints import GATED, random_tensors, write_checkpoint
from ray_nodes import processes, two_nodes
from typer.testing import CliRunner

from pruning.cli import app
from pruning.errors import PruningError
from pruning.on_ray import Job, room
from pruning.statistics import load_statistics

JSON = ("--text", "data.jsonl", "--field", "body", "--window-length", 64)
TOKENS = ("--tokens", 40 * 64)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    lines = [json.dumps({"body": " ".join(f"{d}.{i * i}" for i in range(80))}) for d in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    def run(*args, code=0):
        result = CliRunner().invoke(app, ["calibrate", *map(str, args)])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


def test_without_ray_the_error_names_the_extra(run, dense, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    output = run(dense, "out", *JSON, *TOKENS, "--ray", "auto", code=2).output
    assert "pip install -e '.[ray]' in a checkout" in output
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_go_with_a_cluster_are_refused(run, dense):
    assert "give cuda" in run(dense, "out", *JSON, "--ray", "auto", "--device", "cuda:1", code=2).output
    assert "--shard i/n" in run(dense, "out", *JSON, "--shards", 2, code=2).output
    assert "give --shards" in run(dense, "out", *JSON, "--ray", "auto", "--shard", "1/2", code=2).output


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="needs the extra `ray`, which `make test-all` installs")
    with two_nodes(1) as cluster:
        yield cluster


def assert_same(path, expected):
    found = load_statistics(path)
    assert found.tokens == expected.tokens
    for a, b in zip(found.layers.values(), expected.layers.values(), strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12 * float(b[name].abs().max()))


@pytest.mark.slow
def test_a_cluster_gets_what_one_process_gets(run, dense, cluster):
    options = (*JSON, *TOKENS, "--method", "loss-aware")
    run(dense, "whole", *options)
    result = run(dense, "shards", *options, "--ray", cluster.address, "--shards", 3)
    assert "3 shards, 2 at once" in result.stderr  # one on each node
    assert_same("shards", load_statistics("whole"))
    assert [o.shard for o in load_statistics("shards").origins] == [f"{i}/3 of 40 windows" for i in (1, 2, 3)]


@pytest.mark.slow
def test_a_shard_whose_process_is_killed_is_run_again(run, dense, cluster):
    run(dense, "whole", *JSON, *TOKENS)
    killed, over = [], threading.Event()

    def kill_one():
        while not killed and not over.is_set():
            for process in processes("ray::run_shard"):
                process.kill()
                killed.append(process.pid)
                return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        run(dense, "shards", *JSON, *TOKENS, "--ray", cluster.address)
    finally:
        over.set()
        killer.join()
    assert killed
    assert_same("shards", load_statistics("whole"))


@pytest.mark.slow
def test_a_shard_that_fails_is_named_and_nothing_is_written(run, cluster, tmp_path):
    tensors = random_tensors(GATED)
    tensors["model.layers.0.attn.o_proj.weight"].fill_(3e38)  # finite itself, what comes of it is not
    broken = write_checkpoint(tmp_path / "broken", GATED, tensors)
    output = run(broken, "out", *JSON, *TOKENS, "--ray", cluster.address, "--shards", 2, code=2).output
    assert "/2: layer 1: " in output and "holds NaN or Inf" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_shard_that_fits_no_node_is_refused_and_does_not_wait(cluster):
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert room(Job("src", "cpu", (), 1, 1, 10**6)) == 2
        for job in (Job("src", "cpu", (), 1, 64, 10**6), Job("src", "cuda", (), 1, 1, 10**6)):
            with pytest.raises(PruningError, match=r"no node of the Ray cluster has room.*CPU 1|GPU 0"):
                room(job)
    finally:
        ray.shutdown()
