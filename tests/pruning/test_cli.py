"""The commands, as a user types them."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
from checkpoints import DELTA, GATED, write_checkpoint

from modeling.checkpoint import REDUCTION, open_checkpoint
from pruning.corpus import sha256
from pruning.criteria import CRITERIA
from pruning.statistics import load_statistics


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"{i * i}" for i in range(2000)))
    return file


SMALL = ("--tokens", 256, "--window-length", 64)


@pytest.mark.parametrize("method", CRITERIA)
def test_prune_writes_a_checkpoint_that_loads_and_says_where_it_came_from(run, dense, text, tmp_path, method):
    needs_text = bool(CRITERIA[method].statistics)
    options = ("--text", text, *SMALL) if needs_text else ()
    output = run("prune", dense, "out", "--method", method, "--keep", 8, "--seed", 3, *options)
    assert "d_k 32 => 8" in output
    reduced = open_checkpoint("out")
    assert reduced.spec.d_k == (8, 8, 8)
    reduced.load()

    record = json.loads((tmp_path / "out" / REDUCTION).read_text())
    source = open_checkpoint(dense)
    assert record["source"] == {
        "name": str(dense),
        "hub_id": None,
        "sha256": source.sha256,
        "d_k": [32, 32, 32],
        "state_bytes": source.spec.state_bytes(0),
    }
    assert (record["format"], record["method"], record["seed"]) == (1, method, 3)
    assert (record["export"], record["d_k"]) == ("sliced", [8, 8, 8])
    assert record["state_bytes"] == reduced.spec.state_bytes(0)
    assert record["stock_loaders"] is True
    assert record["budget"] is None
    assert record["evaluation"] is None
    assert set(record["versions"]) == {"lowkey", "python", "torch", "numpy", "safetensors", "tokenizers"}
    assert record["rotated"] is (method == "pca")
    for i, layer in enumerate(record["kept_channels"]):
        for h, kept in enumerate(layer):
            if method == "pca":
                assert kept == list(range(8))
                continue
            name = f"model.layers.{i}.attn.k_proj.weight"
            assert reduced.tensor(name)[h * 8 : (h + 1) * 8].equal(
                source.tensor(name)[[h * 32 + c for c in kept]]
            )
    if not needs_text:
        assert record["calibration"] is None
        assert not (tmp_path / "out.stats.safetensors").exists()
        return
    assert record["calibration"] == {
        "tokens": 256,
        "origins": [
            {
                "text": "text.txt",
                "text_sha256": sha256([text.read_text()]),
                "seed": 3,
                "windows": 4,
                "window_length": 64,
                "tokens_sha256": load_statistics(tmp_path / "out.stats.safetensors").origins[0].tokens_sha256,
                "shard": None,
                "tokens": 256,
            }
        ],
    }
    assert all(len(layer) == 2 and all(head for head in layer) for layer in record["selection"])
    assert load_statistics(tmp_path / "out.stats.safetensors").tokens == 256


def test_the_whole_way(run, dense, text, tmp_path):
    """calibrate in parts, merge, prune twice from one file, evaluate, inspect."""
    gradients = ("--method", "taylor", "--method", "loss-aware")
    run("calibrate", dense, "a.safetensors", "--text", text, *SMALL, "--seed", 1, *gradients)
    assert "128 tokens" in run(
        "calibrate",
        dense,
        "b.safetensors",
        "--text",
        text,
        "--tokens",
        128,
        "--window-length",
        64,
        *gradients,
    )
    assert "384 tokens" in run("merge", "a.safetensors", "b.safetensors", "--out", "all.safetensors")
    before = hashlib.sha256((tmp_path / "all.safetensors").read_bytes()).digest()
    for method in ("drrqr", "taylor", "loss-aware"):
        run("prune", dense, method, "--method", method, "--ratio", 0.75, "--stats", "all.safetensors")
        assert json.loads((tmp_path / method / REDUCTION).read_text())["calibration"]["tokens"] == 384
    assert hashlib.sha256((tmp_path / "all.safetensors").read_bytes()).digest() == before
    assert not list(tmp_path.glob("*.stats.safetensors"))

    output = run("evaluate", dense, "drrqr", "--text", text, "--tokens", 1024, "--json", "deep/e.json")
    assert "1,024 tokens of text.txt" in output and "top-1 agreement" in output
    figures = json.loads((tmp_path / "deep/e.json").read_text())
    assert (figures["kind"], figures["format"]) == ("evaluation", 1)
    assert figures["text_sha256"] == sha256([text.read_text()])
    assert figures["environment"]["device"] == "cpu"
    first, second = figures["checkpoints"]
    assert (first["name"], first["d_k"], second["d_k"]) == (str(dense), [32] * 3, [8] * 3)
    measured = first["perplexity"]
    assert [measured[name] for name in ("tokens", "window", "stride")] == [1024, 512, 512]
    assert first["state_bytes"] > second["state_bytes"]
    assert first["sha256"] == open_checkpoint(dense).sha256
    assert first["perplexity"] != second["perplexity"]
    assert first["divergence"] is None and second["divergence"]["kl"] > 0
    assert second["method"] == "drrqr"
    assert [second[part] for part in ("recall", "rank", "retrieval", "speed")] == [None] * 4

    output = run("inspect", "drrqr")
    assert "d_k 32 => 8" in output
    assert f"{first['state_bytes']:,} => {second['state_bytes']:,} bytes" in output
    assert "made by drrqr" in output and "384 tokens" in output
    assert "layers 0 to 2, each: d_k 32 => 8, " in output
    assert "attn.q_proj.weight F32 [64, 64] => [16, 64]" in output
    assert "attn.v_proj.weight F32 [96, 64]\n" in output
    assert "model.embeddings.weight F32 [257, 64]" in output
    dense_output = run("inspect", dense)
    assert "=>" not in dense_output and "attn.q_proj.weight F32 [64, 64]\n" in dense_output


def test_stats_file_is_made_if_it_is_not_there_and_then_reused(run, dense, text, tmp_path):
    run(
        "prune",
        dense,
        "a",
        "--method",
        "drrqr",
        "--keep",
        8,
        "--stats",
        "s.safetensors",
        "--text",
        text,
        *SMALL,
    )
    made = (tmp_path / "s.safetensors").stat()
    run("prune", dense, "b", "--method", "drrqr", "--keep", 8, "--stats", "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    a, b = (json.loads((tmp_path / d / REDUCTION).read_text()) for d in "ab")
    assert a == b
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_state_bytes_choose_the_largest_aligned_width(run, dense):
    spec = open_checkpoint(dense).spec
    limit = spec.with_d_k((24,) * 3).state_bytes(0)
    run("prune", dense, "a", "--method", "l1", "--state-bytes", limit)
    run("prune", dense, "b", "--method", "l1", "--state-bytes", limit, "--align", 8)
    run("prune", dense, "c", "--method", "l1", "--state-bytes", f"{limit / 1024}KiB", "--align", 6)
    assert [set(open_checkpoint(out).spec.d_k) for out in "abc"] == [{16}, {24}, {24}]


@pytest.mark.parametrize("method", ["l1", "loss-aware"])
def test_per_layer_spends_one_budget_and_says_who_runs_the_result(run, dense, text, tmp_path, method):
    output = run(
        "prune",
        dense,
        "out",
        "--method",
        method,
        "--keep",
        12,
        "--per-layer",
        "--align",
        4,
        "--text",
        text,
        *SMALL,
    )
    spec = open_checkpoint("out").spec
    assert len(set(spec.d_k)) > 1 and all(n % 4 == 0 for n in spec.d_k)
    limit = spec.with_d_k((12,) * 3).state_bytes(0)
    assert spec.state_bytes(0) <= limit
    record = json.loads((tmp_path / "out" / REDUCTION).read_text())
    assert record["stock_loaders"] is False
    assert (record["budget"]["state_bytes"], record["budget"]["align"]) == (limit, 4)
    assert record["budget"]["measured_on"]["tokens"] == 256
    assert [list(curve) for curve in record["budget"]["loss_rise"]] == [[str(n) for n in range(4, 33, 4)]] * 3
    inspected = run("inspect", "out")
    assert "stock loaders refuse it" in output and "stock loaders refuse it" in inspected
    for n in set(spec.d_k) - {32}:
        assert (
            f"d_k 32 => {n}, " in inspected
            and f"attn.q_conv1d.weight F32 [64, 1, 4] => [{2 * n}, 1, 4]" in inspected
        )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["head_dim"] == list(spec.d_k)
    # The same again from the statistics file that was left, measured on the same text.
    if method == "loss-aware":
        again = ("--stats", "out.stats.safetensors", "--text", text, *SMALL)
        run("prune", dense, "two", "--method", method, "--keep", 12, "--per-layer", "--align", 4, *again)
        assert (tmp_path / "two" / REDUCTION).read_text() == (tmp_path / "out" / REDUCTION).read_text()


def test_bundled_text_is_the_default_and_evaluate_is_recorded(run, tmp_path):
    small = {**DELTA, "num_hidden_layers": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    write_checkpoint(tmp_path / "tiny", small)
    output = run("prune", "tiny", "out", "--method", "bilinear", "--keep", 8, *SMALL, "--evaluate")
    record = json.loads((tmp_path / "out" / REDUCTION).read_text())
    assert "bundled CPython text, train side" in record["calibration"]["origins"][0]["text"]
    measured = record["evaluation"]
    assert measured["text"] == "bundled CPython text, heldout side"
    assert measured["dense"]["tokens"] == measured["reduced"]["tokens"] == 24576
    figures = f"perplexity {measured['dense']['perplexity']:.3f} => {measured['reduced']['perplexity']:.3f}"
    assert figures in output
    run("evaluate", "tiny", "out", "--json", "e.json")
    again = json.loads((tmp_path / "e.json").read_text())["checkpoints"]
    assert [c["perplexity"] for c in again] == [measured[v] for v in ("dense", "reduced")]
    assert again[1]["divergence"] == measured["divergence"] and measured["divergence"]["kl"] > 0
    apart = (
        f"KL {measured['divergence']['kl']:.4f} nats a token, "
        f"top-1 agreement {measured['divergence']['top1_agreement']:.1%}"
    )
    assert apart in output and apart in (tmp_path / "out/README.md").read_text()
    assert "tiny" in run("inspect", "out")


PRUNE = ("prune", "DENSE", "out", "--method")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (*PRUNE, "svd", "--keep", 8),
            "method='svd' is unknown; known methods: bilinear, drrqr, energy, l1, loss-aware, pca, random, read-write",
        ),
        ((*PRUNE, "l1", "--keep", 33), "keep=33 must be between 1 and 32"),
        ((*PRUNE, "l1", "--keep", 0), "keep=0 must be between 1 and 32"),
        ((*PRUNE, "l1", "--ratio", 1), "ratio=1.0 must be above 0 and below 1"),
        ((*PRUNE, "l1", "--ratio", -0.5), "ratio=-0.5 must be above 0 and below 1"),
        ((*PRUNE, "l1"), "exactly one of --keep"),
        ((*PRUNE, "l1", "--keep", 8, "--ratio", 0.5), "exactly one of --keep"),
        ((*PRUNE, "l1", "--keep", 8, "--state-bytes", "1MB"), "exactly one of --keep"),
        ((*PRUNE, "l1", "--state-bytes", "much"), "state_bytes='much' is no size"),
        ((*PRUNE, "l1", "--state-bytes", "1KB"), "state_bytes=1000 is below"),
        ((*PRUNE, "l1", "--state-bytes", "1MB", "--align", 7), "align=7 must be an even number"),
        ((*PRUNE, "l1", "--keep", 8, "--per-layer", "--align", 0), "align=0 must be an even number"),
        ((*PRUNE, "l1", "--keep", 8, "--per-layer"), "the state with d_k 16"),
        ((*PRUNE, "l1", "--keep", 8, "--align", 8), "align=8 is for the widths that"),
        ((*PRUNE, "l1", "--keep", 8, "--tokens", 2), "method='l1' reads no statistics"),
        ((*PRUNE, "l1", "--keep", 8, "--device", "tpu"), "device='tpu'"),
        ((*PRUNE, "drrqr", "--keep", 8, "--text", "nowhere.txt"), "nowhere.txt"),
        ((*PRUNE, "drrqr", "--keep", 8, "--tokens", 0), "tokens=0 must be at least 1"),
        ((*PRUNE, "drrqr", "--keep", 8, "--stats", "junk"), "junk is not a statistics file"),
        ((*PRUNE, "drrqr", "--keep", 8, "--stats", "junk", "--tokens", 2), "stats='junk' exists"),
        (("prune", "nowhere", "out", "--method", "l1", "--keep", 8), "nowhere: no such directory"),
        (("prune", "DENSE", "junk", "--method", "l1", "--keep", 8), "out='junk' already exists"),
        (
            ("prune", "DENSE", "junk", "--method", "l1", "--keep", 8, "--overwrite"),
            "holds no state_reduction.json",
        ),
        (("calibrate", "DENSE", "junk"), "out='junk' already exists"),
        (("calibrate", "DENSE", "new", "--method", "svd"), "method='svd' is unknown"),
        (("calibrate", "DENSE", "new", "--shard", "3/2"), "shard='3/2' must be i/n with i from 1 to n"),
        (("calibrate", "DENSE", "new", "--shard", "2"), "shard='2' must be i/n"),
        (("calibrate", "DENSE", "new", "--shard", "1/9"), "16 windows are 4 batches of 4"),
        (("calibrate", "DENSE", "new", "--text", "*.none"), "text='*.none' matches no file"),
        (
            ("calibrate", "DENSE", "new", "--text", "junk", "--field", "body"),
            "field='body' is for .jsonl files",
        ),
        (
            ("calibrate", "DENSE", "new", "--field", "body"),
            "field='body' is for --text FILE.jsonl and --dataset",
        ),
        (("calibrate", "DENSE", "new", "--split", "test"), "split='test' is for --dataset"),
        (
            ("calibrate", "DENSE", "new", "--text", "junk", "--dataset", "a/b"),
            "--text or --dataset, not both",
        ),
        (("merge", "junk", "--out", "new"), "junk is not a statistics file"),
        (("evaluate", "nowhere"), "nowhere: no such directory"),
        (("evaluate", "DENSE", "--tokens", 5), "tokens=5 must be at least 512, which one window scores"),
        (("evaluate", "DENSE", "--stride", 513), "stride=513 must be between 1 and window=512"),
        (("evaluate", "DENSE", "--window", 0), "window=0 must be at least 1"),
        (
            ("evaluate", "DENSE", "--part", "taste"),
            "part='taste' is unknown; known parts: perplexity, recall",
        ),
        (("inspect", "nowhere"), "nowhere: no such directory"),
        (("prune", "DENSE", "out", "--keep", 8), "--method"),
        (("prune", "DENSE", "out", "--method", "l1", "--keep", "many"), "--keep"),
        (("unprune",), "unprune"),
    ],
)
def test_bad_usage_says_what_is_wrong_and_exits_with_2(run, dense, tmp_path, args, message):
    (tmp_path / "junk").write_text("junk")
    output = run(*(dense if a == "DENSE" else a for a in args), code=2)
    assert message in output
    assert "Traceback" not in output
    assert {p.name for p in tmp_path.iterdir()} == {"junk"}


def test_statistics_of_another_checkpoint_are_refused(run, dense, text, tmp_path):
    other = write_checkpoint(tmp_path / "other", GATED, seed=5)
    run("calibrate", other, "s.safetensors", "--text", text, *SMALL)
    output = run("prune", dense, "out", "--method", "drrqr", "--keep", 8, "--stats", "s.safetensors", code=2)
    assert "calibrate it again" in output
    assert not (tmp_path / "out").exists()


def test_statistics_without_gradients_say_how_to_get_them(run, dense, text, tmp_path):
    run("calibrate", dense, "s.safetensors", "--text", text, *SMALL)
    arguments = ("prune", dense, "out", "--method", "loss-aware", "--keep", 8, "--stats", "s.safetensors")
    assert "calibrate again with --method loss-aware" in run(*arguments, code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [(), ("calibrate",), ("merge",), ("prune",), ("evaluate",), ("sweep",), ("inspect",), ("report",)],
)
def test_every_help_has_an_example(run, command):
    output = run(*command, "--help")
    assert re.search(rf"^ lowkey-prune {command[0] if command else 'prune'} +\S", output, re.MULTILINE)


def test_a_real_process_without_a_terminal_prints_the_tree_and_nothing_else(dense, tmp_path):
    command = [sys.executable, "-c", "from pruning.cli import app; app()"]
    args = ["prune", str(dense), str(tmp_path / "out"), "--method", "l1", "--keep", "8"]
    done = subprocess.run(command + args, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    plan = done.stderr.splitlines()
    assert plan[0].startswith("gated_deltanet: 3 layers") and "d_k 32 => 8" in plan[1]
    assert "disk: " in plan[3]  # behind a note; on a machine that is busy lines of progress follow
    assert "d_k 32 => 8" in done.stdout and "gated_deltanet, 3 layers" in done.stdout
    again = subprocess.run(command + args, capture_output=True, text=True, timeout=600)
    assert again.returncode == 2
    assert again.stdout == ""
    assert again.stderr.startswith("error: out=") and again.stderr.count("\n") == 1
