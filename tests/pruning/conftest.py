"""Checkpoints that several files of tests prune."""

import pytest
from checkpoints import GATED, write_checkpoint


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", GATED)
