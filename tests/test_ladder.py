"""The ladder's scripts at toy size: text from wheels that the test makes, a tokenizer, a model, its measurements."""

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from modeling.checkpoint import open_checkpoint
from modeling.families import family_of
from modeling.model import Model
from pruning.corpus import corpus as bundled
from pruning.table import Table, groups

ROOT = Path(__file__).parent.parent
LADDER = ROOT / "benchmarks" / "ladder"
HELD_OUT, TRAINED = "bandit", "alpha"
"""Names that fall on either side of the split."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for text in bundled("heldout") if 256 < len(text.encode()) < 50_000][:24]


def wheel(folder: Path, name: str, licence: str, files: dict[str, str | bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{licence}\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        for path, text in files.items():
            archive.writestr(f"{name}/{path}", text)


def run(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, LADDER / script, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def documents(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(line["package"], line["text"]) for line in map(json.loads, file)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A folder of text, tokenizer and tokens."""
    folder = tmp_path_factory.mktemp("ladder")
    wheels = folder / "wheels"
    wheels.mkdir()
    shared = texts[0]
    python = {f"m{i}.py": t for i, t in enumerate(texts[1:8])}
    wheel(wheels, TRAINED, "License-Expression: MIT", {**python, "again.py": texts[1], "shared.py": shared})
    other = {f"m{i}.py": t for i, t in enumerate(texts[8:16])}
    spoilt = {
        "latin.py": "é".encode("latin-1") * 300,
        "data.py": "x" * 5000,
        "short.py": "pass",
        "a.json": "{}" * 300,
    }
    wheel(
        wheels,
        HELD_OUT,
        "Classifier: License :: OSI Approved :: BSD License",
        {**other, "s.py": shared, **spoilt},
    )
    wheel(wheels, "gplish", "License: GNU GPL v3", {"m.py": texts[16]})
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(LADDER))
        import corpus

        patched.setattr(corpus, "corpus", lambda _side: texts[17:])
        corpus.build(wheels, folder / "text")
        corpus.tokenizer(folder / "text", vocab_size=1024)
        corpus.encode(folder / "text")
    return folder / "text"


def test_a_package_is_on_one_side_and_equal_files_count_once(text: Path, texts: list[str]) -> None:
    train, heldout = (documents(text / f"{side}.jsonl.gz") for side in ("train", "heldout"))
    assert {name for name, _ in train} == {TRAINED, "cpython"}  # the one under GNU's licence is left out
    assert {name for name, _ in heldout} == {HELD_OUT}
    # What both carry is held out, and what is no text for people is on neither side.
    assert sorted(t for _, t in heldout) == sorted([texts[0], *texts[8:16]])
    assert sorted(t for name, t in train if name == TRAINED) == sorted(texts[1:8])
    recorded = {p["name"]: p for p in json.loads((text / "corpus.json").read_text())["packages"]}
    assert recorded[TRAINED]["files"] == 7
    assert recorded[TRAINED]["side"] == "train"
    assert recorded[HELD_OUT]["bytes"] == sum(len(t.encode()) for t in [texts[0], *texts[8:16]])


def test_tokens_are_the_training_side_behind_end_of_text_tokens(text: Path) -> None:
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    tokens = np.fromfile(text / "train.tokens", "<u2")
    first = next(t for _, t in documents(text / "train.jsonl.gz"))
    end = tokens.tolist().index(0, 1)
    assert tokens[0] == 0
    assert tokenizer.decode(tokens[1:end].tolist()) == first
    assert int((tokens == 0).sum()) == len(documents(text / "train.jsonl.gz"))


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


def test_the_counted_operations_are_those_of_a_matrix_product(train: ModuleType) -> None:
    config = train.MODELS["gdn-45m"]
    with torch.device("meta"):
        model = Model(family_of(config).spec(config))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "conv" not in n)
    states = 10 * 4 * 128 * 128
    assert train.operations_per_token(model) == pytest.approx(6 * matrices + 12 * states, rel=2e-3)


@pytest.fixture(scope="module")
def rung(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A toy model, trained, and its table of methods."""
    out = tmp_path_factory.mktemp("rung")
    jobs = ["model/train.json", "methods-per-layer.json", "reduced-32"]
    run(
        "ladder.py",
        "gdn-toy",
        text,
        out,
        "--toy",
        "--seconds",
        "20",
        *(o for job in jobs for o in ("--only", job)),
    )
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
def test_what_is_there_is_not_made_again(rung: Path, text: Path) -> None:
    before = (rung / "model" / "train.json").stat()
    run("ladder.py", "gdn-toy", text, rung, "--toy", "--only", "model/train.json")
    assert (rung / "model" / "train.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_failed_job_is_named_and_what_needs_it_is_not_run(tmp_path: Path) -> None:
    script = [sys.executable, LADDER / "ladder.py", "gdn-toy", tmp_path, tmp_path / "out", "--toy"]
    done = subprocess.run(
        [*map(str, script), "--only", "model/train.json", "--only", "reduced-32"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "failed: model/train.json; not run: reduced-32" in done.stdout
    assert "train.tokens" in (tmp_path / "out" / "train.log").read_text()
