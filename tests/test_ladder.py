"""The ladder's scripts at toy size: training, the measurements of a rung, and their tables."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import torch
import typer
from ladder_text import LADDER, make_text, sources

from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from modeling.model import Model
from pruning.table import Table, groups

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, LADDER / script, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("ladder"), sources())


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(LADDER))
    import train

    return train


def test_windows_are_pieces_of_the_text_and_none_comes_twice_in_an_epoch(train: ModuleType) -> None:
    stream = torch.arange(1000, dtype=torch.int32)
    windows = train.Windows(stream, window=16, batch=4, seed=0)
    seen: list[int] = []
    for _ in range(15):  # an epoch has 61 or 62 windows
        rows = next(windows)
        assert rows.shape == (4, 17)
        assert torch.equal(rows, rows[:, :1] + torch.arange(17))
        seen += rows[:, 0].tolist()
    assert len(set(seen)) == len(seen)
    assert windows.epochs == pytest.approx(15 * 4 * 16 / 1000)


def test_every_model_of_the_ladder_has_the_size_of_its_name(train: ModuleType) -> None:
    sizes = {}
    for name, config in train.MODELS.items():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in Model(family_of(config).spec(config)).parameters())
    assert 40e6 < sizes["gdn-45m"] < 50e6
    assert all(120e6 < size < 145e6 for name, size in sizes.items() if name.endswith("130m"))


@pytest.mark.parametrize("family", ["gated_deltanet", "delta_net", "qwen3_5"])
def test_a_model_of_each_family_is_trained_and_written(
    train: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The checkpoint has what training left, by the figures of a model that is read from it."""
    import models

    layers = 4 if family == "qwen3_5" else 1
    config = getattr(models, family)(32, layers, 2, 64)
    monkeypatch.setitem(train.MODELS, "small", {**config, "vocab_size": 1024})
    trained = []
    save = train.save
    monkeypatch.setattr(train, "save", lambda model, *rest: (trained.append(model), save(model, *rest)))
    train.main("small", text, tmp_path, seconds=1.0, batch=2, window=32, lr=1e-2, heldout_tokens=64)
    checkpoint = open_checkpoint(tmp_path)
    ids, offsets = torch.arange(60), range(0, 61, 20)
    wanted, _ = trained[0](ids, offsets)
    found, _ = checkpoint.load()(ids, offsets)
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 0.02  # of bfloat16
    assert checkpoint.spec.context_length == 2048
    assert json.loads((tmp_path / "train.json").read_text())["heldout"]["tokens"] == 64


def test_a_text_that_cannot_be_trained_on_is_refused_at_once(
    train: ModuleType, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(typer.BadParameter, match="batch=2048 windows of window=128 need 262,273"):
        train.main("gdn-toy", text, tmp_path / "out", batch=2048, window=128)
    with pytest.raises(typer.BadParameter, match="device='cuda:99' is not available here"):
        train.main("gdn-toy", text, tmp_path / "out", device="cuda:99")
    shutil.copytree(text, tmp_path / "text")
    tokenizer = json.loads((text / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [{**tokenizer["added_tokens"][0], "id": 1024, "content": "<|one more|>"}]
    (tmp_path / "text" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        typer.BadParameter, match="tokenizer of 1,025 tokens, but the model's vocab_size is 1,024"
    ):
        train.main("gdn-toy", tmp_path / "text", tmp_path / "out")
    (tmp_path / "text" / "heldout.jsonl.gz").unlink()
    with pytest.raises(typer.BadParameter, match=r"has no heldout\.jsonl\.gz"):
        train.main("gdn-toy", tmp_path / "text", tmp_path / "out")


def test_muon_for_all_matrices_of_a_shape_is_torchs_for_each(train: ModuleType) -> None:
    from optimizers import Muon

    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (24, 16), (8, 16), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    together = Muon(ours, 3e-2, weight_decay=0.1)
    each = torch.optim.Muon(theirs, lr=3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        together.step()
        each.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)  # products in bfloat16


def test_the_counted_operations_are_those_of_a_matrix_product(train: ModuleType) -> None:
    config = train.MODELS["gdn-45m"]
    with torch.device("meta"):
        model = Model(family_of(config).spec(config))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "conv" not in n)
    states = 10 * 4 * 128 * 128
    assert train.operations_per_token(model) == pytest.approx(6 * matrices + 12 * states, rel=2e-3)


@pytest.fixture(scope="module")
def rung(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A toy model, trained, and all that is measured of it."""
    out = tmp_path_factory.mktemp("rung")
    assert "all jobs are done" in run("ladder.py", "gdn-toy", text, out, "--toy", "--seconds", "20")
    return out


@pytest.mark.slow
def test_a_toy_model_learns_and_is_measured(rung: Path) -> None:
    record = json.loads((rung / "model" / "train.json").read_text())
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    assert (
        record["heldout"]["perplexity"] < 1024
    )  # what the tokenizer's size is worth to a model that knows nothing

    table = msgspec.json.decode((rung / "methods-per-layer.json").read_bytes(), type=Table)
    assert set(groups(table)) == {"loss-aware", "loss-aware, per layer"}
    assert open_checkpoint(rung / "reduced-32").spec.d_k == (32, 32)


@pytest.mark.slow
def test_tables_and_report_are_of_what_the_ladder_wrote(rung: Path, tmp_path: Path) -> None:
    tables = run("tables.py", rung)
    assert tables.startswith("# gdn-toy\n")
    assert "nothing was measured" not in tables
    for name in ("`read-write`", "| 512 | `drrqr`", "| per-layer-32 | int8", "| reconstructed-32-small |"):
        assert name in tables
    files = [str(f) for f in rung.glob("*.json") if f.name not in {"corpus.json", "rung.json"}]
    command = [
        sys.executable,
        "-c",
        "from pruning.cli import app; app()",
        "report",
        tmp_path / "r.html",
        *files,
    ]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_are_of_the_landed_results_too() -> None:
    folder = ROOT / "benchmarks" / "results" / "ladder" / "gdn-130m"
    tables = run("tables.py", folder)
    assert tables.startswith("# gdn-130m\n")
    landed = json.loads((folder / "methods.json").read_text())
    (cell,) = (c for c in landed["reduced"] if (c["row"], c["column"]) == ("pca", 96))
    rise = 100 * (cell["perplexity"] / landed["dense"]["perplexity"] - 1)
    assert f"| `pca` | {rise:+.2f} %, KL {cell['kl']:.4f} |" in tables


def test_a_table_that_was_cut_short_counts_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(LADDER))
    import tables

    landed = json.loads((ROOT / "benchmarks/results/ladder/gdn-130m/methods.json").read_text())
    first = {(c["method"], c["column"]): c["perplexity"] for c in landed["reduced"]}
    of_two = [c for c in landed["reduced"] if c["method"] in {"drrqr", "energy"}]
    kept = [c for c in of_two if (c["method"], c["column"]) != ("energy", 96)]
    for name in ("calibration-512.json", "calibration-4096.json.partial"):
        (tmp_path / name).write_text(json.dumps({**landed, "reduced": kept}))
    head, _, *rows = tables.calibration(tmp_path).split("\n")
    assert head == "| tokens | method | 96 | 64 | 48 | 32 |"
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {tokens}", f"`{method}`"] for tokens in ("512", "4,096") for method in ("energy", "drrqr")
    ]
    rise = 100 * (first["energy", 64] / landed["dense"]["perplexity"] - 1)
    assert rows[0].startswith(f"| 512 | `energy` |  | {rise:+.2f} % |")


@pytest.mark.slow
def test_what_is_there_is_not_made_again(rung: Path, text: Path) -> None:
    before = (rung / "model" / "train.json").stat()
    # As after an interruption between the statistics and the checkpoint.
    shutil.rmtree(rung / "reduced-32")
    assert (rung / "reduced-32.stats.safetensors").exists()
    said = run("ladder.py", "gdn-toy", text, rung, "--toy")
    assert said.count(": ") == 1 and "reduced-32: " in said
    assert (rung / "model" / "train.json").stat().st_mtime_ns == before.st_mtime_ns


def ladder(*arguments: str | Path, **options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LADDER / "ladder.py"), *map(str, arguments)]
    # As wide as no line of an error is broken.
    environment = {**os.environ, "COLUMNS": "1000"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, **options)


def test_the_readme_names_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LADDER))
    import ladder

    jobs = ladder.Rung("gdn-130m", Path("text"), Path("out"), "cpu", 1.0, ladder.REAL).jobs
    rows = [line for line in (LADDER / "README.md").read_text().split("\n") if line.startswith("| `")]
    named = set(re.findall(r"`([^` ]+)`", " ".join(row.split(" | ")[0] for row in rows)))
    for job in jobs:
        width = re.sub(r"-(96|64|48|32)\b", "-w", job.output)
        assert named & {job.output, width, width.replace("-w", "-W")}, job.output


def test_a_failed_job_is_named_and_what_needs_it_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("{}")
    out = tmp_path / "out"
    done = ladder("gdn-toy", tmp_path, out, "--toy", "--only", "model/train.json", "--only", "reduced-32")
    assert done.returncode == 1
    assert f"exit 2, see {out / 'train.log'}" in done.stdout
    assert "failed: model/train.json; not run: reduced-32" in done.stdout
    assert "train.tokens" in (out / "train.log").read_text()


def test_a_folder_takes_results_of_one_model_alone(text: Path, tmp_path: Path) -> None:
    first = ladder("gdn-toy", text, tmp_path, "--toy", "--until", "0")
    assert first.returncode == 1 and "not run: model/train.json" in first.stdout
    for name, toy, key in (
        ("gdn-45m", ["--toy"], "model='gdn-toy', not 'gdn-45m'"),
        ("gdn-toy", [], "toy=True, not False"),
    ):
        done = ladder(name, text, tmp_path, *toy, "--until", "0")
        assert done.returncode == 2
        assert f"has results of {key}; choose another folder" in done.stderr


def test_options_that_name_nothing_are_refused(text: Path, tmp_path: Path) -> None:
    for options, words in (
        (["gdn-13m", text, tmp_path / "out"], "name='gdn-13m' must be one of gdn-toy, gdn-45m"),
        (
            ["gdn-toy", text, tmp_path / "out", "--only", "train.json"],
            "only='train.json' must be one of model/train.json",
        ),
        (["gdn-toy", tmp_path, tmp_path / "out"], "has no corpus.json"),
        (["gdn-toy", text, tmp_path / "out", "--side-by-side", "0"], "Invalid value for '--side-by-side'"),
    ):
        done = ladder(*options)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_an_interruption_ends_the_jobs(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, LADDER / "ladder.py", "gdn-toy", text, tmp_path, "--toy", "--seconds", "600"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        log = tmp_path / "train.log"
        deadline = time.monotonic() + 120
        while not (log.exists() and "parameters" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on with the jobs whose output is missing" in said
    assert not Path(f"/proc/{child}").exists()
