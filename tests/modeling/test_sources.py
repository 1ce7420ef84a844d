"""What a name means that a user gives: a path that is there is that path."""

import pytest
from checkpoints import GATED, write_checkpoint

from modeling.sources import CheckpointError, as_path, check_source, local_directory


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["model", "model@v1", "org/model@main", "a:b=c", "~"])
def test_a_directory_that_is_there_is_that_directory(home, name):
    path = write_checkpoint(home / name, GATED)
    assert local_directory(name) == as_path(name)
    assert local_directory(name).resolve() == path
    check_source(name)
    if name != "~":
        assert local_directory(f"~/{name}") == path == as_path(f"~/{name}")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "x" * 5000, "/" + "x/" * 3000])
def test_a_name_that_no_file_can_have_is_refused_like_others(home, name):
    with pytest.raises(CheckpointError, match="no such directory, and not a hub id"):
        local_directory(name)
    with pytest.raises(CheckpointError, match="no such directory"):
        check_source(name)
