"""What tokenizers and end-of-text tokens do to the commands: nothing silent, and nothing after the work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import GATED, random_tensors, write_checkpoint
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from modeling.checkpoint import open_checkpoint
from pruning.calibration import Encoder
from pruning.statistics import load_statistics

SMALL = ("--tokens", "512", "--window-length", "64")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"{i * i}" for i in range(2000)))
    return file


def lowkey_prune(*arguments, code=0, cwd):
    """The command as a process of its own; what it wrote to standard error."""
    command = Path(sys.executable).with_name("lowkey-prune")
    done = subprocess.run(
        [command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A checkpoint whose tokenizer was saved after a call that asked for truncation and padding."""
    path = write_checkpoint(tmp_path_factory.mktemp("used") / "c", GATED)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128, pad_token="<|endoftext|>")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_stored_truncation_and_padding_do_not_change_a_calibration(used, dense, text, tmp_path):
    said = lowkey_prune("calibrate", used, "used.safetensors", "--text", text, *SMALL, cwd=tmp_path)
    note = "stores truncation to 128 tokens and padding to 128 tokens; this is ignored, text is read whole"
    assert said.count(note) == 1 and f"note: {used}/tokenizer.json {note}" in said.replace("\n", " ")
    said = lowkey_prune("calibrate", dense, "clean.safetensors", "--text", text, *SMALL, cwd=tmp_path)
    assert "ignored" not in said
    a, b = (load_statistics(tmp_path / f"{name}.safetensors") for name in ("used", "clean"))
    assert a.origins == b.origins
    for one, other in zip(a.layers.values(), b.layers.values(), strict=True):
        assert all(one[name].equal(other[name]) for name in other)
    document = text.read_text()
    assert Encoder(open_checkpoint(used))(document) == [
        0,
        *AutoTokenizer.from_pretrained(used)(document, add_special_tokens=False)["input_ids"],
    ]


@pytest.mark.parametrize(
    ("command", "times"),
    [
        (("prune", "{used}", "out", "--method", "energy", "--keep", "8", "--evaluate", "--dry-run"), 1),
        (("evaluate", "{used}", "{used}", "--text", "{text}", "--tokens", "512", "--part", "recall"), 2),
    ],
)
def test_what_is_ignored_is_said_once_a_checkpoint(used, text, tmp_path, command, times):
    arguments = [part.format(used=used, text=text) for part in command]
    assert lowkey_prune(*arguments, cwd=tmp_path).count("this is ignored") == times


def write_eos(path, token):
    config = {**GATED, "eos_token_id": token}
    write_checkpoint(path, config, random_tensors(GATED))
    return path


PRUNE = ("prune", "c", "out", "--method", "l1", "--keep", "8", "--evaluate")


@pytest.mark.parametrize(
    "command",
    [
        PRUNE,
        (*PRUNE, "--dry-run"),
        ("calibrate", "c", "out", "--dry-run"),
        ("calibrate", "c", "out", "--text", "{text}"),
        ("evaluate", "c", "--text", "{text}"),
    ],
)
@pytest.mark.parametrize("fault", ["eos", "no tokenizer", "broken tokenizer"])
def test_what_text_cannot_be_read_with_is_found_before_any_work(text, tmp_path, command, fault):
    path = write_eos(tmp_path / "c", 300 if fault == "eos" else 0)
    if fault == "no tokenizer":
        (path / "tokenizer.json").unlink()
    elif fault == "broken tokenizer":
        (path / "tokenizer.json").write_text("{")
    said = lowkey_prune(*[part.format(text=text) for part in command], code=2, cwd=tmp_path)
    expected = {
        "eos": "error: c/config.json: eos_token_id=300 must be below vocab_size=257",
        "no tokenizer": "error: c/tokenizer.json is missing",
        "broken tokenizer": "error: c/tokenizer.json is not a tokenizer",
    }
    assert said.startswith(expected[fault])
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_method_that_reads_no_text_needs_no_token_for_its_end(tmp_path):
    write_eos(tmp_path / "c", [300, 0])
    lowkey_prune(*PRUNE[:-1], cwd=tmp_path)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [300, 0]
