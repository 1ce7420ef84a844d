"""What several files of tests prune, and how they run the command."""

import pytest
from checkpoints import GATED, write_checkpoint
from typer.testing import CliRunner

import pruning.progress
from pruning.cli import app


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """On a busy machine work that takes no time here may take long enough for a line that says how far it is. Tests of
    such lines set their own interval."""
    monkeypatch.setattr(pruning.progress, "EVERY", 1e6)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", GATED)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `lowkey-prune` in an empty directory and gives its output; the exit code must be `code`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args, code=0):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result.output

    return run
