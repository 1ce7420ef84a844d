"""JSON that users hand over and that no parser likes: one line that names the file."""

import json

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from safetensors.torch import save_file
from typer.testing import CliRunner

from modeling.checkpoint import CheckpointError
from pruning.cli import app
from pruning.errors import PruningError
from pruning.report.inputs import read_inputs
from pruning.statistics import load_statistics

VALUES = {
    "surrogate": b'"\\ud800"',
    "digits": b"9" * 5000,
    "brackets": b"[" * 100_000 + b"]" * 100_000,
    "bytes": b'"\xff"',
}
FILES = {
    "evaluation": b'{"other": %s, "kind": "evaluation", "format": %s}',
    "table": b'{"kind": "pruning_table", "other": %s, "format": %s}',
    "kind": b'{"kind": %s, "format": %s}',
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("form", FILES.values(), ids=FILES)
@pytest.mark.parametrize("name", ["x.json", "c/state_reduction.json", "c/recovery.json"])
def test_inputs_of_a_report(tmp_path, name, form, value):
    (tmp_path / "c").mkdir()
    (tmp_path / name).write_bytes(form % (value, value))
    with pytest.raises((PruningError, CheckpointError), match=name.rpartition("/")[2]):
        read_inputs([tmp_path / name.partition("/")[0]])


RECORDS = {
    **{name: value.decode(errors="replace") for name, value in VALUES.items()},
    "origins": '{"format": 3, "names": ["k_sum"], "origins": [5], "source_sha256": "", "unfinished": null}',
    "list": "[]",
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_the_record_of_statistics(tmp_path, monkeypatch, record):
    monkeypatch.setattr("pruning.statistics._check_layers", lambda layers: None)
    file = tmp_path / "s.safetensors"
    save_file({"layers.0.k_sum": torch.zeros(1)}, file, metadata={"lowkey_statistics": record})
    with pytest.raises(PruningError, match=r"s\.safetensors is not a statistics file"):
        load_statistics(file)


def test_a_method_that_cannot_be_written_is_shown_by_its_escape(tmp_path):
    path = write_checkpoint(tmp_path / "c", GATED)
    (path / "state_reduction.json").write_text('{"method": "\\ud800"}')
    (tmp_path / "t.txt").write_text(" ".join(map(str, range(300))))
    options = ("--text", str(tmp_path / "t.txt"), "--tokens", "512", "--json", str(tmp_path / "e.json"))
    result = CliRunner().invoke(app, ["evaluate", str(path), *options])
    assert result.exit_code == 0, repr(result.exception)
    assert json.loads((tmp_path / "e.json").read_text())["checkpoints"][0]["method"] == "\\ud800"
